"""Whole online runs on a tiny random model: tokenizer, prompts and teacher made on the spot, minutes never needed."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any
from unittest import mock

from tests.tiny import megatron

WORDS = [f"w{i}" for i in range(14)]
ONLINE = {
    "hybrid": True,
    "tokenizer_type": "HuggingFaceTokenizer",
    "vocab_size": None,
    "calculate_per_token_loss": None,
    "seq_length": 16,
    "micro_batch_size": 8,
    "global_batch_size": 32,
    "train_iters": 6,
    "lr": 3e-3,
    "min_lr": 3e-3,
    "weight_decay": 0,
    "init_method_std": 0.02,
    "log_interval": 1000,
    "hybrid_group_size": 4,
    "hybrid_max_response_length": 3,
}


def make_tokenizer(folder: Path, words: list[str] = WORDS) -> Path:
    """One token per word, no chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["</s>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(str(folder))
    return folder


def make_prompts(path: Path, words: list[str] = WORDS) -> Path:
    """The answer to a word is the next word."""
    pairs = zip(words, [*words[1:], words[0]], strict=True)
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in pairs))
    return path


def run(folder: str, overrides: dict[str, Any], data: Any = None, *, plots: bool = False) -> str:
    """One online run; returns what Megatron and the report printed on this rank.

    data   from Megatron's arguments to the script's own (dataset provider, get_batch); None: they must not be asked
    plots  drawn at the end, which takes longer than a short run
    """
    flags = ONLINE | {
        "tokenizer_model": f"{folder}/tokenizer",
        "hybrid_prompts": f"{folder}/prompts.jsonl",
        "hybrid_run_dir": f"{folder}/run",
    }
    out = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        if not plots:
            stack.enter_context(mock.patch("megatron_hybrid.train.plots.draw", lambda run_dir: []))
        args = stack.enter_context(megatron(quiet=False, **(flags | overrides)))
        from megatron.core.enums import ModelType
        from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

        import megatron_hybrid as mh

        container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        with contextlib.suppress(SystemExit):  # how Megatron stops at --exit-interval
            provider, get_batch = (_of_the_script, _of_the_script) if data is None else data(args)
            step = mh.HybridForwardStep(get_batch=get_batch, base_loss_func=_of_the_script)
            mh.pretrain_hybrid(container, provider, ModelType.encoder_or_decoder, step)
    return out.getvalue()


def _of_the_script(*args: Any, **kwargs: Any) -> Any:
    """Stands for a pretrain script's own data and loss."""
    raise AssertionError("an online run asked for the data or the loss of the script that it was put into")


def with_teacher(folder: str | Path, name: str, **more: Any) -> dict[str, Any]:
    """Flags of a run under the folder's teacher that reports into `name`."""
    under = {"hybrid_discount": 0.5, "hybrid_imitation_weight": 0.1, "hybrid_teacher_load": f"{folder}/teacher"}
    return under | {"hybrid_run_dir": f"{folder}/{name}"} | more


def teacher_flags(folder: str) -> dict[str, Any]:
    """Of a Megatron run that saves a random model with the student's tokenizer and another seed."""
    return ONLINE | {
        "hybrid": None,
        "calculate_per_token_loss": True,
        "tokenizer_model": f"{folder}/tokenizer",
        "train_iters": 1,
        "lr": 1e-6,
        "min_lr": 0.0,
        "seed": 77,
        "init_method_std": 0.2,
        "save": f"{folder}/teacher",
        "save_interval": 1,
        "dataloader_type": "external",
    }


def make_teacher(folder: str, overrides: dict[str, Any]) -> None:
    """A checkpoint of a random model with the student's tokenizer and another seed, saved by Megatron itself."""
    from tests.pretrain_jobs import provide, stock_forward_step

    flags = teacher_flags(folder)
    with megatron(**(flags | overrides)) as args:
        from megatron.core.enums import ModelType
        from megatron.training import pretrain
        from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

        args.vocab_size = args.padded_vocab_size
        container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        pretrain(container, provide(args), ModelType.encoder_or_decoder, stock_forward_step)


def steps(folder: str | Path, run_dir: str = "run", *, kind: str = "step") -> list[dict[str, Any]]:
    """The training steps (or evaluations, "eval") of a run, without clock and timings."""
    lines = [json.loads(line) for line in Path(folder, run_dir, "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k != "time" and not k.startswith(("timing_s/", "perf/"))}
        for line in lines
        if line["kind"] == kind
    ]
