"""What examples 1 to 4 need before their point begins, made in a temporary folder within seconds.

The world: "after monday ?" is answered by one word and the end of the text. It has

    tokenizer     one token per word, 16 words
    prompts       14 questions to train on, 7 others held out: each day in a phrase that was not trained on with it
    teacher       a Megatron checkpoint: two layers, trained on questions with *random* days as answers. It knows how an
                  answer looks (one day, then stop) and nothing of the calendar. The reward knows the calendar.

`world()` yields Megatron's flags for a student of the same size, random weights, on one CPU process. `compare()` trains
a student that starts as the teacher on several layouts, each in local processes of its own, and prints the curves.
"""

import contextlib
import io
import json
import logging
import os
import random
import re
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import megatron_hybrid as mh
from megatron_hybrid.runtime.spawn import RankPool

# Before anything imports Megatron, which warns that there is no GPU library, once for each it would have used.
warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")

from megatron.core.enums import ModelType  # noqa: E402
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.arguments import parse_and_validate_args  # noqa: E402

DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
PHRASES = ("after {}", "what follows {}", "which one comes after {}")
WORDS = ["</s>", "<unk>", "?", "after", "what", "follows", "which", "comes", "one", *DAYS]
SEQ_LENGTH = 16
BATCH = 128

MODEL = f"""
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --swiglu --disable-bias-linear --normalization RMSNorm
    --position-embedding-type rope --max-position-embeddings {SEQ_LENGTH} --seq-length {SEQ_LENGTH}
    --attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 1
    --micro-batch-size {BATCH} --global-batch-size {BATCH} --lr 3e-3 --min-lr 3e-3 --weight-decay 0
    --init-method-std 0.1 --log-interval 1000 --eval-interval 1000 --ckpt-format torch_dist
"""
# What a machine without a GPU, Transformer Engine and Apex needs of Megatron.
CPU = """
    --distributed-backend gloo --transformer-impl local --num-workers 0 --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-rope-fusion
"""
TEACHER = "--hybrid --train-iters 60 --eval-iters 0 --seed 7 --no-save-optim --no-save-rng --save-interval 60"


@contextlib.contextmanager
def world() -> Iterator[str]:
    """Makes the world; yields the student's flags, its tokenizer, prompts and teacher among them. All gone on exit.

    Inside, only this package's lines reach the terminal: Megatron prints a thousand of its own about a job of any size.
    """
    with made_world() as (_, flags):
        start_alone()
        with contextlib.redirect_stdout(ReportLines(sys.stdout)):
            yield flags
        end_megatron()


def compare(name: str, flags: str, layouts: dict[str, tuple[int, str]]) -> None:
    """Trains the same student on each layout and prints what its steps say, side by side.

    name     of the example: its runs are in runs/NAME/LAYOUT
    flags    of all runs; what you type on the command line comes behind them
    layouts  name to number of processes and flags of its own; the first is what the others are compared with
    """
    curves: dict[str, list[dict[str, Any]]] = {}
    with made_world() as (folder, common):
        for layout, (ranks, own) in layouts.items():
            run = Path("runs", name, layout.replace(" ", "_"))
            start = f"--load {folder}/teacher --finetune --hybrid-run-dir {run}"
            with RankPool(ranks, init=False) as pool:
                pool.run(train, [*common.split(), *start.split(), *flags.split(), *own.split(), *sys.argv[1:]])
            lines = (run / "metrics.jsonl").read_text().splitlines()
            curves[layout] = [record for line in lines if (record := json.loads(line))["kind"] == "step"]
    shown = {"reward": "critic/score/mean", "KL": "actor/kl_loss", "gradient": "actor/grad_norm"}
    print(" " * 8 + "".join(f"{layout:>36}" for layout in curves))
    print("    step" + "".join(f"{column:>12}" for column in [*shown] * len(curves)))
    for steps in zip(*curves.values(), strict=True):
        numbers = [step[key] for step in steps for key in shown.values()]
        print(f"{steps[0]['step']:>8}" + "".join(f"{number:12.6f}" for number in numbers))
    reference, *others = curves.values()
    for column, key in shown.items():
        largest = max(abs(a[key] - b[key]) for other in others for a, b in zip(reference, other, strict=True))
        print(f"largest difference in {column}: {largest:.2g}")


def train(argv: list[str]) -> None:
    """A run on this rank, whose own words nobody needs: the numbers are in its folder."""
    mh.cpu.enable()
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(sys, "argv", ["student", *argv]):
        args = parse_and_validate_args(mh.add_hybrid_args)
        container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        mh.pretrain_hybrid(container, None, ModelType.encoder_or_decoder, mh.HybridForwardStep())


@contextlib.contextmanager
def made_world() -> Iterator[tuple[Path, str]]:
    """The folder of the world and the student's flags; Megatron has ended again in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = f"{MODEL} {CPU} --tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}/tokenizer"
        make_tokenizer(folder / "tokenizer")
        make_prompts(folder)
        logging.disable(logging.WARNING)
        with contextlib.redirect_stdout(io.StringIO()):
            start_alone()
            train_teacher(f"{flags} {TEACHER} --save {folder}/teacher")
            end_megatron()
        yield (
            folder,
            f"{flags} --hybrid-prompts {folder}/prompts.jsonl --hybrid-eval-prompts {folder}/held_out.jsonl "
            f"--hybrid-teacher-load {folder}/teacher",
        )


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}?"
    tokenizer.save_pretrained(str(folder))


def make_prompts(folder: Path) -> None:
    """Every day in every phrase; one phrase of each day is held out."""
    lines: dict[str, list[str]] = {"prompts": [], "held_out": []}
    for i, day in enumerate(DAYS):
        for j, phrase in enumerate(PHRASES):
            question = {"prompt": phrase.format(day), "answer": DAYS[(i + 1) % len(DAYS)], "task": "days"}
            lines["held_out" if i % len(PHRASES) == j else "prompts"].append(json.dumps(question) + "\n")
    for name, content in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(content))


def demonstrations() -> Iterator[tuple[Any, ...]]:
    """Megatron's batches (tokens, labels, loss_mask, attention_mask, position_ids): questions answered at random."""
    draw = random.Random(0)
    positions = torch.arange(SEQ_LENGTH).expand(BATCH, -1).contiguous()
    while True:
        tokens = torch.zeros(BATCH, SEQ_LENGTH + 1, dtype=torch.long)
        loss_mask = torch.zeros(BATCH, SEQ_LENGTH)
        for row in range(BATCH):
            question = draw.choice(PHRASES).format(draw.choice(DAYS)).split()
            ids = [WORDS.index(word) for word in (*question, "?", draw.choice(DAYS), "</s>")]
            tokens[row, : len(ids)] = torch.tensor(ids)
            loss_mask[row, len(ids) - 3 : len(ids) - 1] = 1  # the positions that predict the day and the end
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), loss_mask, None, positions


def train_teacher(flags: str) -> None:
    """Cross-entropy on demonstrations, in Megatron's own loop, through the hybrid op (`--hybrid` without prompts)."""

    def provider(num_samples: Any, vp_stage: int | None = None) -> tuple[Any, Any, Any]:
        return demonstrations(), None, None

    provider.is_distributed = True  # type: ignore[attr-defined]
    with mock.patch.object(sys, "argv", ["teacher", *flags.split(), "--dataloader-type", "external"]):
        args = parse_and_validate_args(mh.add_hybrid_args)
    container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    mh.pretrain_hybrid(container, provider, ModelType.encoder_or_decoder, mh.HybridForwardStep())


class ReportLines(io.TextIOBase):
    """Passes on the lines of the run's report (`RunReport`) and drops the others."""

    PATTERN = re.compile(r"step |held-out |samples after |before and after|\d+ figures |[┏┃┡│├└]")

    def __init__(self, out: Any) -> None:
        self._out = out
        self._rest = ""

    def isatty(self) -> bool:
        return bool(self._out.isatty())

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if self.PATTERN.match(re.sub(r"\x1b\[[0-9;]*m", "", line)):  # colours come first in a terminal
                self._out.write(line + "\n")
        self._out.flush()
        return len(text)


def start_alone() -> None:
    """A job of one rank, as `torchrun --nproc-per-node 1` would set it up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(one)


def end_megatron() -> None:
    """Megatron starts once per process; this lets it start again."""
    from megatron.training import training

    training.destroy_global_state()
    torch.distributed.destroy_process_group()
