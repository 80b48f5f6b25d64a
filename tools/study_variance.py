"""Gradient variance of policy gradients with a KL, of hybrids and of ours, at fixed weights and on the same rollouts.

python tools/study_variance.py --quick                         # a minute: the direction, exact reference
python tools/study_variance.py                                 # the small world, responses of 3 to 17 tokens
python tools/study_variance.py --model smollm2                 # SmolLM2 pruned, bf16, responses of up to 8 and 16
python tools/study_variance.py --model smollm2 --student runs/smollm2_recovery/checkpoints --name "smollm2 trained"
python tools/study_variance.py --report                        # tables and figures again, of all that is there

The same questions are answered again and again by --batches independent batches of rollouts; a reference comes from
more of them, or from every response there is where these can be listed. What is compared, and whose formula:
`study_estimators.py`; how: `study_gradients.py`, `study_statistics.py`. A batch that is done lies in --out and is not
repeated, so an interrupted study goes on where it was; other settings need another folder.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from study_estimators import Source
    from study_gradients import Sketch
    from study_models import Setting

ROOT = Path(__file__).parents[1]
REFERENCE_SEED = 1_000_000
"""Batches of the reference are drawn with other noise than those that are judged."""
QUICK = {"lengths": [3], "batches": 32, "discounts": [0.0, 1.0], "lambdas": [1.0], "world_steps": 200, "sketch": 1021}
LENGTHS = {"small": [3, 5, 9, 17], "smollm2": [8, 16]}


def measure(options: argparse.Namespace, length: int, folder: Path) -> None:
    """All batches of one setting that are not in the folder yet, and its description."""
    import study_enumeration
    from study_estimators import REFERENCE, parts
    from study_gradients import Sketch

    sources = parts(options.discounts, options.lambdas)
    with opened(options, length) as setting:
        sketch = Sketch(setting.student, options.sketch)
        describe(options, length, folder, setting, sketch)
        if study_enumeration.num_responses(setting) <= study_enumeration.MOST:
            if not (folder / "exact.npz").exists():
                save(folder / "exact.npz", sketch=study_enumeration.exact_gradient(setting, sketch).sketch)
        else:
            chosen = {name: sources[part] for name, part in REFERENCE.items()}
            run(options, setting, sketch, chosen, folder, "reference", options.reference_batches, REFERENCE_SEED)
        run(options, setting, sketch, sources, folder, "batch", options.batches, 0)


def run(
    options: argparse.Namespace,
    setting: "Setting",
    sketch: "Sketch",
    sources: "dict[str, Source]",
    folder: Path,
    kind: str,
    count: int,
    first_seed: int,
) -> None:
    """Batches of one kind, with a line of progress."""
    from study_gradients import batch_gradients

    wanted = {k: lacking(folder / f"{kind}-{k:04d}.npz", sources) for k in range(count)}
    wanted = {k: names for k, names in wanted.items() if names}
    say = Progress(f"{folder.name}, {kind}", len(wanted))
    for k, names in wanted.items():
        started = time.monotonic()
        scored = setting.rollouts(first_seed + k)
        gradients = batch_gradients(
            setting.student,
            setting.teacher,
            scored,
            {name: sources[name] for name in names},
            sketch,
            vocab_size=setting.vocab_size,
            backend=options.backend,
        )
        lengths = scored.rollouts.response_mask.sum(dim=1).float()
        said = {"reward": float(scored.rewards.mean()), "length": float(lengths.mean())}
        add_to(folder / f"{kind}-{k:04d}.npz", names, gradients, said, time.monotonic() - started)
        say.step()


def lacking(path: Path, sources: "Iterable[str]") -> list[str]:
    """The names whose gradients a batch's file does not hold: all where there is none yet."""
    import numpy as np

    held = set(np.load(path)["names"]) if path.exists() else set()
    return [name for name in sources if name not in held]


def add_to(path: Path, names: list[str], gradients: Any, said: dict[str, float], seconds: float) -> None:
    """Writes a batch; one that is there gets these gradients besides: the same seed has drawn the same rollouts."""
    import numpy as np

    whole: dict[str, Any] = {"names": names, "sketch": gradients.sketch, "squared_norm": gradients.squared_norm}
    if path.exists():
        held = dict(np.load(path))
        if not np.isclose(held["reward"], said["reward"]):
            raise SystemExit(f"study_variance: {path} holds other rollouts than this machine draws. Delete its folder.")
        whole = {name: np.concatenate([held[name], of_new]) for name, of_new in whole.items()}
        seconds += float(held["seconds"])
    save(path, seconds=seconds, **said, **whole)


class Progress:
    """A line now and then: how many, how fast, how long still."""

    def __init__(self, what: str, count: int) -> None:
        self.what, self.count, self.done, self.started, self.said = what, count, 0, time.monotonic(), 0.0

    def step(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.said < 5 and self.done < self.count:
            return
        self.said, each = now, (now - self.started) / self.done
        left = time.strftime("%H:%M:%S", time.gmtime(each * (self.count - self.done)))
        print(f"{self.what} {self.done}/{self.count}  {each:.2f} s each  left {left}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def opened(options: argparse.Namespace, length: int) -> "Iterator[Setting]":
    """The models, questions and reward of one response length."""
    import torch
    from study_models import small, smollm2
    from study_world import LENGTHS as LENGTHS_OF_DIGITS
    from study_world import make_world

    asked: dict[str, Any] = {"num_prompts": options.num_prompts, "group_size": options.group_size}
    asked["student"] = options.student
    if options.model == "small":
        digits = [length - 1] if options.quick else LENGTHS_OF_DIGITS
        world = make_world(options.world, steps=options.world_steps, lengths=digits)
        with small(world, length - 1, **asked) as setting:
            yield setting
    else:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
        with smollm2(options.models, length, dtype=dtype, **asked) as setting:
            yield setting


def save(path: Path, **values: Any) -> None:
    """One file, complete or not there."""
    import numpy as np

    unfinished = path.with_suffix(".tmp")
    with open(unfinished, "wb") as file:
        np.savez(file, **values)
    unfinished.replace(path)


def describe(options: argparse.Namespace, length: int, folder: Path, setting: "Setting", sketch: "Sketch") -> None:
    """`setting.json`, which a later start must find the same."""
    about = {
        "model": options.name or options.model,
        "length": length,
        "prompts": len(setting.prompts),
        "prompt_tokens": [len(prompt.token_ids) for prompt in setting.prompts],
        "group_size": options.group_size,
        "dtype": options.dtype if options.model != "small" else "fp32",
        "student": str(options.student) if options.student else "",
        "sketch": options.sketch,
        "parameters": sum(p.numel() for p in sketch.parameters),
        "layers": sketch.layers,
        "discounts": options.discounts,
    }
    path = folder / "setting.json"
    if path.exists() and json.loads(path.read_text()) != about:
        raise SystemExit(f"study_variance: {folder} holds batches of other settings ({path}). Give another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Measures what is missing, then writes tables and figures."""
    options = parsed()
    sys.path.insert(0, str(ROOT))  # so that a checkout needs no installation
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not options.report:
        import torch

        torch.set_num_threads(options.threads)
        for length in options.lengths or LENGTHS[options.model]:
            measure(options, length, options.out / f"{options.name or options.model}, {length} tokens")
    from study_report import write_report

    for line in write_report(options.out, options.readme):
        print(line)
    return 0


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, `--quick` and the defaults of a model filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("MEGATRON_HYBRID_CACHE", "~/.cache/megatron_hybrid")).expanduser()
    add: Callable[..., Any] = parser.add_argument
    add("--model", choices=tuple(LENGTHS), default="small")
    add("--student", type=Path, help="a student's torch_dist checkpoint in place of the model's own")
    add("--name", help="what tables call it; default: the model's name")
    add("--lengths", type=int, nargs="+", help="tokens of a response at most")
    add("--batches", type=int, default=64, help="batches of rollouts that are judged")
    add("--reference-batches", type=int, default=256, help="batches of the reference, where it cannot be exact")
    add("--num-prompts", type=int, default=4, help="questions, the same in every batch")
    add("--group-size", type=int, default=4, help="responses to a question")
    add("--discounts", type=float, nargs="+", default=[0.0, 0.9, 0.99, 1.0], help="0 and 1 among them")
    add("--lambdas", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0], help="weights of the reward, beta 1")
    add("--sketch", type=int, default=4093, help="cells of a layer's sketch, a prime")
    add("--dtype", choices=("fp32", "bf16"), default="bf16", help="of SmolLM2")
    add("--backend", default="torch", help="of the op: torch, compile")
    add("--world-steps", type=int, default=1500, help="training steps of each small model")
    add("--world", type=Path, default=Path("runs/study/world"), help="folder of the small world, made once")
    add("--models", type=Path, default=cache / "models", help="folder of examples/6_smollm2_recovery.sh's models")
    add("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    add("--out", type=Path, default=Path("runs/study/variance"), help="folder of the batches")
    add("--readme", type=Path, help="write the tables between its markers, and the figures beside it")
    add("--report", action="store_true", help="measure nothing")
    add("--quick", action="store_true", help="one length, a student trained for seconds, fewer discounts")
    options = parser.parse_args(argv)
    if options.quick:
        vars(options).update(QUICK, world=options.out / "quick world")
    if not {0.0, 1.0} <= set(options.discounts):
        parser.error(f"--discounts must have 0 and 1 among them, got {options.discounts}: they are what is compared")
    return options


if __name__ == "__main__":
    sys.exit(main())
