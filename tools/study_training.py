"""What methods make of the same rollouts: reward by task, KL to the teacher, entropy, and rollouts to reach a reward.

python tools/study_training.py                        # 8 methods x 3 seeds x 3840 rollouts; some 10 minutes on a core
python tools/study_training.py --reward exact --beta 0.1
python tools/study_training.py --knows 0 --world runs/study/world-novice --out runs/study/training-novice
python tools/study_training.py --quick                # 3 methods, one seed: the direction alone
python tools/study_training.py --report               # tables and figures again, of all that is there

The small world of `study_world.py`: a mixture of four tasks, a teacher that is right on two of them, a student that
half knows all; the methods are in `study_runs.py`. Runs are the real trainer's, one after another. A finished run is in
--out and is not repeated; other settings need another folder.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARED = ("reward", "beta", "steps", "batch", "lr", "world_steps", "knows")
"""What all runs of a study have in common."""
QUICK = {
    "steps": 40,
    "seeds": [1],
    "methods": ["reward alone, RLOO", "distillation", "full hybrid"],
    "world_steps": 300,
}


def main() -> int:
    """Runs what is missing, then writes tables and figures."""
    options = parsed()
    sys.path.insert(0, str(ROOT))  # so that a checkout needs no installation
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("WANDB_MODE", "disabled")
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.report:
        run_missing(options)
    from study_outcome import write_report

    for line in write_report(options.out, options.readme):
        print(line)
    return 0


def run_missing(options: argparse.Namespace) -> None:
    """Every run that is not finished, seeds in turn, so that methods compare also half-way."""
    from study_runs import DIGITS, flags_of, methods, train
    from study_world import make_world

    from megatron_hybrid.runtime.spawn import RankPool

    about = {name: getattr(options, name) for name in SHARED}
    settings = options.out / "settings.json"
    if settings.exists() and json.loads(settings.read_text()) != about:
        raise SystemExit(
            f"study_training: {options.out} holds runs of other settings ({settings}). Give another --out."
        )
    settings.write_text(json.dumps(about) + "\n", encoding="utf-8")
    known = methods(options.steps, options.beta)
    wanted = [(name, seed) for seed in options.seeds for name in options.methods or known]
    missing = [
        (name, seed) for name, seed in wanted if not (run_folder(options.out, name, seed) / "summary.json").exists()
    ]
    if not missing:
        return
    world = make_world(options.world, steps=options.world_steps, lengths=[DIGITS], knows=options.knows)
    started = time.monotonic()
    with RankPool(1, init=False, timeout_s=options.timeout) as pool:
        for done, (name, seed) in enumerate(missing):
            folder = run_folder(options.out, name, seed)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.jsonl").unlink(missing_ok=True)  # of a run that was cut off: it starts anew
            argv = flags_of(world, known[name], folder, seed=seed, about=about)
            pool.run(train, argv, known[name].others, str(folder / "train.log"))
            each = (time.monotonic() - started) / (done + 1)
            left = time.strftime("%H:%M:%S", time.gmtime(each * (len(missing) - done - 1)))
            said = f"run {done + 1}/{len(missing)}  {name}, seed {seed}  {each:.0f} s each  left {left}"
            print(said, file=sys.stderr, flush=True)


def run_folder(out: Path, method: str, seed: int) -> Path:
    """Where a run lies: a folder for each method, in it one for each seed."""
    return out / method.replace(" ", "_").replace(",", "").replace("'", "") / f"seed-{seed}"


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, `--quick` filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--reward", choices=("share", "exact"), default="share", help="places that are right, or all of them at once")
    add("--beta", type=float, default=0.05, help="weight of the KL, of all methods that have one; lambda is 1")
    add("--knows", type=float, default=0.4, help="chance that the student knows a digit at the start")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--steps", type=int, default=60, help="optimizer steps of a run")
    add("--batch", type=int, default=64, help="rollouts of a step")
    add("--lr", type=float, default=5e-4, help="the same for all")
    add("--methods", nargs="+", help="names in study_runs.py; default: all")
    add("--world", type=Path, default=Path("runs/study/world-3"), help="folder of the small world, made once")
    add("--world-steps", type=int, default=600, help="training steps of each of its models")
    add("--threads", type=int, default=1, help="threads of torch")
    add("--timeout", type=float, default=3600.0, help="seconds that one run may take")
    add("--out", type=Path, help="folder of the runs; default: runs/study/training-REWARD")
    add("--readme", type=Path, help="write the tables between its markers, and the figures beside it")
    add("--report", action="store_true", help="run nothing")
    add("--quick", action="store_true", help="few methods, one seed, fewer steps")
    options = parser.parse_args(argv)
    options.out = options.out or Path(f"runs/study/training-{options.reward}")
    if options.quick:
        vars(options).update(QUICK, world=options.out / "quick world")
    return options


if __name__ == "__main__":
    sys.exit(main())
