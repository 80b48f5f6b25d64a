"""Rollouts written into a file by the run that samples them, and gradients of recorded responses on ranks of a pool."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.online_jobs import run

EOS = 0


def record(folder: str, overrides: dict[str, Any], path: str) -> None:
    """An online run on one rank; the first group of each prompt goes into `path`, in the order of the prompt file."""
    from megatron_hybrid.rollouts.generate import Sampler

    groups: dict[str, list[dict[str, Any]]] = {}
    sample = Sampler.sample

    def and_keep(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = sample(self, *args, **kwargs)
        found: dict[int, list[dict[str, Any]]] = {}
        for row, prompt in enumerate(batch.prompts):
            mask = batch.response_mask[row]
            line = {
                "prompt": prompt.text,
                "task": prompt.task,
                "answer": prompt.answer,
                "response_ids": batch.tokens[row][mask].tolist(),
                "logprobs": batch.sampled_logprobs[row][mask].tolist(),
                "reward": float(batch.responses[row] == prompt.answer),
                "group": prompt.text,
            }
            found.setdefault(prompt.prompt_id, []).append(line)
        for lines in found.values():
            groups.setdefault(lines[0]["prompt"], lines)
        return batch

    with mock.patch.object(Sampler, "sample", and_keep):
        run(folder, overrides)
    order = [json.loads(line)["prompt"] for line in Path(folder, "prompts.jsonl").read_text().splitlines()]
    Path(path).write_text("".join(json.dumps(line) + "\n" for prompt in order for line in groups[prompt]))


def demonstrations(folder: str, way: str, flags: dict[str, Any]) -> dict[str, Any]:
    """Shards of the gradient of the file's responses, in one step on this layout.

    way  hybrid: our whole path, file to op; stock: Megatron's own cross-entropy on their tokens; reference: forward KL
         to the teacher, autograd in float64
    """
    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.schedule.forward_step import HybridForwardStep
    from tests.distributed.gradient import run_schedule, shards
    from tests.tiny import build, megatron, set_weights, start

    # A vocabulary without padding: Megatron's own cross-entropy gives probability to padded columns.
    with megatron(vocab_size=64, no_check_for_nan_in_loss_and_grad=True, **flags) as args:
        model = start(args, ddp=way != "reference")
        set_weights(model, "student")
        parallel = parallel_context()
        teacher = None
        if args.hybrid_divergence == "forward_kl":
            teacher = build(args)
            set_weights(teacher, "teacher")
        batches, config = rollout_batches(folder, args, parallel, teacher)
        if way == "reference":
            assert teacher is not None
            _forward_kl(model[0].double(), teacher[0].double(), batches)
            return {"shards": shards(model)}
        step = HybridForwardStep(config) if way == "hybrid" else partial(_stock_step)
        run_schedule(model, step, batches, parallel)
        return {"shards": shards(model)}


def rollout_batches(
    folder: str, args: Any, parallel: Any, teacher: Any = None, layout: Any = None
) -> tuple[list[Any], Any]:
    """The file's responses as the online loop would hand them to the schedule."""
    import dataclasses

    from transformers import AutoTokenizer

    from megatron_hybrid.config import HybridConfig
    from megatron_hybrid.metrics import Metrics
    from megatron_hybrid.online_config import OnlineConfig
    from megatron_hybrid.prompts.stream import PromptStream
    from megatron_hybrid.prompts.template import PromptTemplate
    from megatron_hybrid.rewards.build import build_rubric
    from megatron_hybrid.rollouts.recorded import recorded_rollouts
    from megatron_hybrid.schedule.layout import SequenceLayout
    from megatron_hybrid.schedule.microbatch import credited, microbatches
    from megatron_hybrid.teachers.frozen import FrozenTeacher
    from megatron_hybrid.train.credit import Credit, Scored
    from megatron_hybrid.train.recorded import open_rollouts

    config, online = HybridConfig.from_args(args), OnlineConfig.from_args(args)
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
    source = open_rollouts(config, online, tokenizer)
    assert source is not None
    stream = PromptStream(source, PromptTemplate(tokenizer), seed=1, max_prompt_length=16)
    prompts = stream.draw(0, source.size, parallel.dp.rank, parallel.dp.size)
    rollouts = recorded_rollouts(prompts, decode=tokenizer.decode, device=torch.device("cpu"))
    credit = Credit(config, parallel)
    scored = credit.collected(Scored(rollouts, build_rubric(online).score(rollouts).rewards))
    batches = microbatches(
        rollouts,
        micro_batch_size=args.micro_batch_size,
        aggregation=config.aggregation,
        layout=layout or SequenceLayout.of(parallel),
    )
    if teacher is not None:
        payloads = FrozenTeacher(teacher, parallel).annotate(batches)
        batches = [dataclasses.replace(b, teacher=p) for b, p in zip(batches, payloads, strict=True)]
    return credited(batches, credit.credit_for(scored, step=0, metrics=Metrics())), config


def _stock_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
    """A plain script's step on the same tokens: labels and mask are those of the response tokens."""
    from tests.pretrain_jobs import loss_func

    batch = next(data_iterator)
    tokens = batch.student.tokens
    b, s = tokens.shape
    labels, mask = torch.zeros(s * b, dtype=torch.long), torch.zeros(s * b)
    labels[batch.student.token_rows], mask[batch.student.token_rows] = batch.targets, 1.0
    labels, mask = labels.view(s, b).T.contiguous(), mask.view(s, b).T.contiguous()
    output = model(tokens, batch.student.position_ids, None, labels=labels, loss_mask=mask)
    return output, partial(loss_func, mask)


def _forward_kl(student: Any, teacher: Any, batches: list[Any]) -> None:
    """Leaves the gradient of mean KL(teacher || student) per response token, one sequence at a time, in main_grad."""
    total: Any = 0.0
    count = 0
    for batch in batches:
        for prompt in batch.prompts:
            (response,) = prompt.responses
            tokens = torch.tensor([[*prompt.token_ids, *response.token_ids]])[:, :-1]
            where = torch.arange(tokens.shape[1])[None]
            answers = slice(len(prompt.token_ids) - 1, None)

            def log_probs(model: Any, tokens: Tensor = tokens, where: Tensor = where, at: slice = answers) -> Tensor:
                return model(tokens, where, None)[0, at].double().log_softmax(-1)

            log_p = log_probs(student)
            with torch.no_grad():
                log_q = log_probs(teacher)
            total = total + (log_q.exp() * (log_q - log_p)).sum()
            count += len(response.token_ids)
    (total / count).backward()
    for parameter in student.parameters():
        parameter.main_grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def fill_store(folder: str, store: str, flags: dict[str, Any]) -> list[str]:
    """What tools/precompute_teacher.py does between its command line and its exit; the lines it said on this rank."""
    from megatron_hybrid.train.precompute import precompute, prepare_store
    from tests.online_jobs import ONLINE
    from tests.tiny import megatron

    said: list[str] = []
    with megatron(**ONLINE | {"tokenizer_model": f"{folder}/tokenizer"} | flags) as args:
        from megatron.training import training

        prepared = prepare_store(args, store)
        training.initialize_megatron()
        precompute(prepared, args, store, said.append)
        torch.distributed.barrier()
    return said


def refused(job: Any, *args: Any) -> str:
    """Kind and words of our error that ended a job; one that leaves a job would cost the pool its ranks."""
    from megatron_hybrid.errors import HybridError

    try:
        job(*args)
    except HybridError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
