"""A pretrain script in the shape that each generation of Megatron gives it, and what it does on whichever is installed.

    PYTHONPATH=FOLDER_OF_A_VERSION python -m tests.mcore.version_jobs WORK_FOLDER RANKS

prints, as one JSON object, what Megatron logs of every step of four runs (see `losses`), and the steps and held-out
evaluations of two online runs. A tokenizer from a file: versions count the words of NullTokenizer differently.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests.online_jobs import ONLINE, WORDS, make_prompts, make_tokenizer, steps, teacher_flags, with_teacher
from tests.pretrain_jobs import RandomTokens, get_batch, loss_func, stock_forward_step
from tests.tiny import command_line


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    """The script's own model, as Megatron's pretrain_gpt.py of 0.17 and 0.18 builds it."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    return GPTModel(
        config=config or core_transformer_config_from_args(args),
        transformer_layer_spec=get_gpt_layer_local_spec(normalization=args.normalization),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def datasets(num_samples: Any, vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    from megatron.training import get_args

    args = get_args()
    args.vocab_size = args.vocab_size or args.padded_vocab_size
    return RandomTokens(args, 0), RandomTokens(args, 10_000), None


datasets.is_distributed = True  # type: ignore[attr-defined]


def of_the_tokenizer(folder: str) -> dict[str, Any]:
    return {
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": f"{folder}/tokenizer",
        "vocab_size": None,
    }


@contextlib.contextmanager
def started(flags: dict[str, Any]) -> Iterator[io.StringIO]:
    """A command line, a CPU, and what is printed."""
    from megatron_hybrid.runtime import cpu

    out = io.StringIO()
    with cpu.enabled(), contextlib.redirect_stdout(out), mock.patch.object(sys, "argv", command_line(**flags)):
        yield out


def call(pretrain: Callable[..., Any], forward_step: Any) -> None:
    """The call that ends a script, as the installed generation has it."""
    from megatron.core.enums import ModelType

    import megatron_hybrid as mh
    from megatron_hybrid.mcore.symbols import PARSES_INSIDE, TAKES_PROVIDER, generation

    kind = ModelType.encoder_or_decoder
    if generation() == PARSES_INSIDE:
        pretrain(datasets, model_provider, kind, forward_step, extra_args_provider=mh.add_hybrid_args)
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(mh.add_hybrid_args)
    if generation() == TAKES_PROVIDER:
        pretrain(pretrain_cfg_container_from_args(args), datasets, model_provider, kind, forward_step)
        return
    from megatron.training.argument_utils import gpt_config_from_args

    pretrain(pretrain_cfg_container_from_args(args, gpt_config_from_args(args)), datasets, kind, forward_step)


def likes_ones(question: str, response: str, answer: str, record: dict[str, Any]) -> float:
    """A reward that even a random student earns."""
    return float(response.count("1"))


def losses(folder: str, kind: str, overrides: dict[str, Any]) -> list[tuple[str, str]]:
    """Loss and gradient norm of each step, as Megatron prints them.

    kind  stock: Megatron alone; off: our names without --hybrid; own: --hybrid with the script's own loss;
          demonstrations: the stock data through the hybrid op
    """
    import megatron_hybrid as mh

    flags = of_the_tokenizer(folder) | {"dataloader_type": "external", "hybrid": kind in ("own", "demonstrations")}
    step = mh.HybridForwardStep(get_batch=get_batch, base_loss_func=None if kind == "demonstrations" else loss_func)
    with started(flags | overrides) as out:
        from megatron.training import pretrain

        call(pretrain if kind == "stock" else mh.pretrain_hybrid, stock_forward_step if kind == "stock" else step)
    return re.findall(r"lm loss: (\S+) .*?grad norm: (\S+) ", out.getvalue())


def make_teacher(folder: str, overrides: dict[str, Any]) -> None:
    """A checkpoint by Megatron itself, of another depth than the student."""
    from megatron.training import pretrain

    flags = teacher_flags(folder) | {"num_layers": 2}
    with started(flags | overrides):
        call(pretrain, stock_forward_step)


def online(folder: str, overrides: dict[str, Any]) -> str:
    """An online run of three steps, with an evaluation at both ends."""
    import megatron_hybrid as mh

    flags = ONLINE | {
        "tokenizer_model": f"{folder}/tokenizer",
        "hybrid_reward": "tests.mcore.version_jobs:likes_ones",
        "hybrid_prompts": f"{folder}/prompts.jsonl",
        "hybrid_eval_prompts": f"{folder}/held_out.jsonl",
        "eval_iters": 1,
        "train_iters": 3,
    }
    with started(flags | overrides) as out:
        call(mh.pretrain_hybrid, mh.HybridForwardStep(get_batch=get_batch, base_loss_func=loss_func))
    return out.getvalue()


def main(folder: str, size: int) -> dict[str, Any]:
    from megatron_hybrid.runtime.spawn import RankPool

    layout, other = {"tensor_model_parallel_size": size}, {"pipeline_model_parallel_size": size}
    make_tokenizer(Path(folder, "tokenizer"))
    make_prompts(Path(folder, "prompts.jsonl"), WORDS[:10])
    make_prompts(Path(folder, "held_out.jsonl"), WORDS[10:])
    seen: dict[str, Any] = {}
    with RankPool(size, init=False) as pool:
        for kind in ("stock", "off", "own", "demonstrations"):
            seen[kind] = pool.run(losses, folder, kind, layout)[-1]
        pool.run(make_teacher, folder, layout)
        pool.run(online, folder, layout | with_teacher(folder, "checkpoint"))
        pool.run(online, folder, other | with_teacher(folder, "copy", hybrid_teacher_load="self"))
    for run in ("checkpoint", "copy"):
        seen[run] = [*steps(folder, run), *steps(folder, run, kind="eval")]
    return seen


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
