"""`pretrain_hybrid`: `megatron.training.pretrain` with the online step around its schedule call.

Takes whatever the installed `pretrain` takes, in its own order, and finds the forward step and the dataset provider in
it by name. Without `--hybrid` the call goes straight through. With it, everything that can be wrong with the settings,
the prompts and the teacher is found out before Megatron builds a model (`prepare`); the stages that need Megatron's
process groups are made when it asks for its data, which is after the model and before the first step (`_build_loop`).
"""

from __future__ import annotations

import inspect
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hybrid.checkpoint.fingerprint import tokenizer_fingerprint
from megatron_hybrid.config import HybridConfig, OnlineConfig, as_dict
from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.mcore.symbols import borrow, check_megatron
from megatron_hybrid.prompts.sources import open_sources
from megatron_hybrid.prompts.stream import PromptStream
from megatron_hybrid.prompts.template import PromptTemplate
from megatron_hybrid.rewards.by_source import default_rubric
from megatron_hybrid.rewards.rubric import Rubric
from megatron_hybrid.schedule.forward_step import HybridForwardStep, Runtime
from megatron_hybrid.schedule.inject import injected
from megatron_hybrid.schedule.layout import SequenceLayout
from megatron_hybrid.train import journal
from megatron_hybrid.train.loop import OnlineLoop
from megatron_hybrid.train.report import RunReport

logger = logging.getLogger(__name__)

_PROBED_QUESTIONS = 256
"""Questions of an endless source looked at to learn its tasks: sources mix their tasks evenly."""


def pretrain_hybrid(*args: Any, **kwargs: Any) -> Any:
    """A drop-in around `megatron.training.pretrain`, whatever the signature of the installed version.

    The forward step must be a `HybridForwardStep`. With `--hybrid --hybrid-prompts ...` training is online: the dataset
    provider passed in is not asked, micro-batches come from rollouts. With `--hybrid` alone the script's own data is
    trained by its `base_loss_func`, or through the hybrid op where it has none. Without `--hybrid` this is `pretrain`
    itself.

    Raises:
        ConfigError, DataError: settings, prompts or teacher are unusable; no model has been built then.
        MegatronMismatch: the installed Megatron lacks something that is borrowed; names it.
    """
    pretrain = borrow("megatron.training.training", "pretrain")
    arguments = borrow("megatron.training", "get_args")()
    if not getattr(arguments, "hybrid", False):
        return pretrain(*args, **kwargs)

    check_megatron()
    call = inspect.signature(pretrain).bind(*args, **kwargs)
    forward_step = call.arguments.get("forward_step_func")
    if not isinstance(forward_step, HybridForwardStep):
        raise ConfigError(
            f"--hybrid is on, but forward_step_func is {type(forward_step).__name__}: the hybrid loss lives in "
            "HybridForwardStep. Pass HybridForwardStep(get_batch=..., base_loss_func=...) instead of the function."
        )
    from megatron_hybrid.mcore.training import refuse_unsupported

    refuse_unsupported(arguments)
    from_flags = HybridConfig.from_args(arguments)
    if forward_step.config not in (None, from_flags):
        raise ConfigError(
            "HybridForwardStep was given a config that differs from the --hybrid-* flags: one of the two would be "
            "silently ignored. Leave config out where flags are used."
        )
    forward_step.config = from_flags
    online = OnlineConfig.from_args(arguments)
    if online.prompts is None:
        return pretrain(*args, **kwargs)

    prepared = prepare(arguments, forward_step.config, online, has_teacher=forward_step.teacher is not None)
    with ExitStack() as stack:
        # Iterators are handed over as they are, and of micro-batches that the script's own get_batch does not know.
        stack.enter_context(_replaced(arguments, "dataloader_type", "external"))
        stack.enter_context(_replaced(forward_step, "get_batch", next))
        provider = _provider(stack, prepared, arguments, forward_step)
        call.arguments["train_valid_test_dataset_provider"] = provider
        try:
            result = pretrain(*call.args, **call.kwargs)
        except SystemExit:  # how Megatron stops at --exit-interval, --exit-duration-in-mins and on signals
            provider.finish()
            raise
        provider.finish()
    return result


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@dataclass(frozen=True)
class Prepared:
    """What can be known before Megatron starts."""

    config: HybridConfig
    online: OnlineConfig
    tokenizer: Any
    prompts: PromptStream
    eval_prompts: PromptStream
    rubric: Rubric
    tasks: tuple[str, ...]
    teacher_args: dict[str, Any] | None


def prepare(args: Namespace, config: HybridConfig, online: OnlineConfig, *, has_teacher: bool = False) -> Prepared:
    """Opens prompts, tokenizer and the teacher's arguments, and holds them against each other.

    Raises:
        ConfigError, DataError: see the messages; nothing has been built or written.
    """
    per_replica = args.global_batch_size // args.data_parallel_size
    if per_replica % config.group_size:
        raise ConfigError(
            f"--global-batch-size {args.global_batch_size} over {args.data_parallel_size} data-parallel replicas is "
            f"{per_replica} responses each, which is no multiple of group_size {config.group_size}: a group must not "
            "be split. Change one of the three."
        )
    has_future_cost = config.imitation_weight > 0 and config.discount > 0
    if has_future_cost and config.cost_baseline == "group" and args.micro_batch_size % config.group_size:
        raise ConfigError(
            f"cost_baseline 'group' compares the responses to one prompt at the same position, for which a micro-batch "
            f"must hold whole groups: --micro-batch-size is {args.micro_batch_size}, group_size {config.group_size}. "
            "Use a multiple of group_size, or --hybrid-cost-baseline none."
        )
    room = args.seq_length - online.max_response_length
    if room < 1:
        raise ConfigError(
            f"--seq-length {args.seq_length} leaves no room to answer: responses may have "
            f"{online.max_response_length} tokens (--hybrid-max-response-length), which leaves {room} for the prompt. "
            "Raise one or lower the other."
        )
    if config.imitation_weight > 0 and online.teacher_load is None and not has_teacher:
        raise ConfigError(
            f"imitation_weight is {config.imitation_weight}, but there is no teacher to imitate: give "
            "--hybrid-teacher-load, or set --hybrid-imitation-weight 0 for reward alone."
        )
    tokenizer = _load_tokenizer(args)
    teacher_args = _teacher_args(online.teacher_load, tokenizer) if online.teacher_load else None

    num_eval = int(args.eval_iters) * int(getattr(args, "eval_global_batch_size", None) or args.global_batch_size)
    training, held_out = open_sources(online.prompts or "", online.eval_prompts, seed=args.seed, num_eval=num_eval)
    if held_out is None:
        if num_eval:
            raise ConfigError(
                f"--eval-iters is {args.eval_iters}, but nothing is held out of {online.prompts}: give "
                "--hybrid-eval-prompts another file, or set --eval-iters 0."
            )
        held_out = training
    template = PromptTemplate(tokenizer, system_prompt=online.system_prompt)
    streams = [PromptStream(s, template, seed=args.seed, max_prompt_length=room) for s in (training, held_out)]
    _open_run_dir(online.run_dir)
    tasks = {source.item(i).task for source in (training, held_out) for i in range(source.size or _PROBED_QUESTIONS)}
    return Prepared(
        config=config,
        online=online,
        tokenizer=tokenizer,
        prompts=streams[0],
        eval_prompts=streams[1],
        rubric=default_rubric(file_reward=online.file_reward, truncated_reward=online.truncated_reward),
        tasks=tuple(sorted(tasks)),
        teacher_args=teacher_args,
    )


def _load_tokenizer(args: Namespace) -> Any:
    if args.tokenizer_type != "HuggingFaceTokenizer":
        raise ConfigError(
            f"--tokenizer-type is {args.tokenizer_type}: online prompts need a chat template and an end-of-sequence "
            "token, which come with --tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER."
        )
    tokenizer = _read_tokenizer(args.tokenizer_model)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer in {args.tokenizer_model} has no end-of-sequence token: a response could never end. Set "
            "eos_token in its tokenizer_config.json."
        )
    return tokenizer


def _read_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise DataError(
            f"no tokenizer can be read from {folder!r}: {error}. Give the folder of a Hugging Face tokenizer."
        ) from error


def _open_run_dir(folder: str) -> None:
    """A folder that cannot be written, or whose journal is broken, must not be found out after the model is built."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the run folder {folder!r} cannot be made: {error}. Give another --hybrid-run-dir."
        ) from error
    journal.read(Path(folder) / "metrics.jsonl")


def _teacher_args(checkpoint: str, tokenizer: Any) -> dict[str, Any]:
    """The teacher's stored arguments, once its token ids are known to mean what the student's mean."""
    from megatron_hybrid.mcore.checkpoint_io import load_megatron_args

    stored = load_megatron_args(checkpoint)
    theirs = stored.get("hybrid_tokenizer_fingerprint")
    if theirs is None and stored.get("tokenizer_type") == "HuggingFaceTokenizer":
        theirs = tokenizer_fingerprint(_read_tokenizer(stored["tokenizer_model"]))
    if theirs is not None and theirs != tokenizer_fingerprint(tokenizer):
        raise DataError(
            f"the teacher in {checkpoint} was made with another tokenizer ({stored.get('tokenizer_model')}): the same "
            "id means different tokens, so imitation would teach noise. Use a teacher with the student's tokenizer."
        )
    rows = stored.get("vocab_size")
    # A head may have more rows than the tokenizer has tokens; that they mean the same is known from the fingerprint.
    if rows is not None and (rows < len(tokenizer) or (rows > len(tokenizer) and theirs is None)):
        raise DataError(
            f"the teacher in {checkpoint} has a vocabulary of {rows} tokens, the student's tokenizer {len(tokenizer)}: "
            "their distributions cannot be compared token by token. Use a teacher with the student's tokenizer."
        )
    if theirs is None:
        logger.warning(
            "the teacher in %s names no tokenizer that can be read (type %s): that its token ids mean what the "
            "student's mean is taken on trust",
            checkpoint,
            stored.get("tokenizer_type"),
        )
    return stored


class _Provider:
    """What Megatron calls a dataset provider: asked once per model chunk, after the model is built."""

    is_distributed = True
    """Megatron asks every rank, not only the first of each tensor-parallel group."""

    def __init__(self, build: Callable[[], OnlineLoop]) -> None:
        self._build = build
        self._loop: OnlineLoop | None = None

    def __call__(self, num_samples: Any, vp_stage: int | None = None) -> tuple[Any, Any, Any]:
        if self._loop is None:
            self._loop = self._build()
        # The schedule is fed by the loop; these stand for data that exists.
        return iter(()), iter(()), None

    def finish(self) -> None:
        """The before/after table and the plots, on the logging rank."""
        if self._loop is not None and self._loop.report is not None:
            self._loop.report.finish()


def _provider(stack: ExitStack, prepared: Prepared, args: Namespace, forward_step: HybridForwardStep) -> _Provider:
    def build() -> OnlineLoop:
        loop = _build_loop(prepared, args, forward_step)
        stack.enter_context(injected(loop))
        return loop

    return _Provider(build)


def _build_loop(prepared: Prepared, args: Namespace, forward_step: HybridForwardStep) -> OnlineLoop:
    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.rollouts.generate import Sampler
    from megatron_hybrid.teachers.frozen import FrozenTeacher

    config, online, tokenizer = prepared.config, prepared.online, prepared.tokenizer
    parallel = parallel_context()
    teacher = forward_step.teacher
    if teacher is None and prepared.teacher_args is not None:
        assert online.teacher_load is not None
        teacher = FrozenTeacher.load(online.teacher_load, prepared.teacher_args, parallel)
    sampler = Sampler(
        parallel=parallel,
        device=torch.device(torch.cuda.current_device()),  # Megatron's own idiom; the CPU runtime answers it too
        vocab_size=len(tokenizer),
        stop_ids=frozenset({tokenizer.eos_token_id}),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        temperature=config.student_temperature,
        max_response_length=online.max_response_length,
        batch_size=online.rollout_batch_size,
    )
    forward_step.runtime = Runtime(tp=parallel.tp, vocab_size=len(tokenizer))
    return OnlineLoop(
        args=args,
        config=config,
        forward_step=forward_step,
        parallel=parallel,
        layout=SequenceLayout.of(parallel, sequence_parallel=args.sequence_parallel),
        prompts=prepared.prompts,
        eval_prompts=prepared.eval_prompts,
        sampler=sampler,
        rubric=prepared.rubric,
        teacher=teacher,
        tasks=prepared.tasks,
        report=_open_report(prepared, args),
        samples_interval=online.samples_interval,
        gradient_norms_interval=online.gradient_norms_interval,
    )


def _open_report(prepared: Prepared, args: Namespace) -> RunReport | None:
    """The report of the rank where Megatron keeps its own writers: the last."""
    if dist.get_rank() != dist.get_world_size() - 1:
        return None
    from megatron_hybrid.mcore.training import get_tensorboard_writer, get_wandb_writer

    report = RunReport(
        prepared.online.run_dir,
        total_steps=args.train_iters,
        tensorboard=get_tensorboard_writer(),
        wandb=get_wandb_writer(),
        start_step=args.iteration,
    )
    resolved = {"hybrid": as_dict(prepared.config), "online": as_dict(prepared.online), "tasks": list(prepared.tasks)}
    report.config({**resolved, "megatron": {name: value for name, value in sorted(vars(args).items())}})
    return report
