"""What methods make of the same rollouts: reward by task, KL to the teacher, entropy, and rollouts to reach a reward.

python tools/study_training.py                        # 13 methods x 3 seeds x 3840 rollouts; some 15 minutes on a core
python tools/study_training.py --setting exact        # another table of the report, see study_settings.py
python tools/study_training.py --beta 0.2 --out runs/study/tried/high-beta      # the same, with something changed
python tools/study_training.py --quick                # 3 methods, one seed: the direction alone
python tools/study_training.py --report               # tables and figures again, of all that is there

A mixture of four tasks, a teacher that is right on two of them, a student that knows some of all: digits
(`study_world.py`), or tasks of reasoning-gym (`study_gym.py`). Methods are in `study_runs.py`, goals in
`study_goals.py`. Runs are the real trainer's, one after another. A finished run is in --out and is not repeated; other
settings need another folder.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # so that a checkout needs no installation

from study_settings import SETTINGS, WORLDS, Setting  # noqa: E402

QUICK_METHODS = ["reward alone, RLOO", "distillation", "full hybrid"]


def main() -> int:
    """Runs what is missing, then writes tables and figures."""
    options = parsed()
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
    """Every run that is not finished: first those that choose learning rates, then seeds in turn, methods in turn."""
    from study_outcome import TUNING_SEED, chosen_rate, is_done, run_folder
    from study_runs import flags_of, methods, train

    from megatron_hybrid.runtime.spawn import RankPool

    setting: Setting = options.setting
    record = options.out / "settings.json"
    if record.exists() and Setting.read(json.loads(record.read_text())) != setting:
        raise SystemExit(f"study_training: {options.out} holds runs of other settings ({record}). Give another --out.")
    record.write_text(json.dumps(asdict(setting)) + "\n", encoding="utf-8")
    known = methods(setting)
    names = options.methods or list(known)
    looked_at = [(name, lr, TUNING_SEED) for lr in setting.lrs for name in names] if len(setting.lrs) > 1 else []
    reported = [(name, None, seed) for seed in options.seeds for name in names]

    def folder_of(name: str, lr: float | None, seed: int) -> tuple[Path, float]:
        rate = chosen_rate(options.out, name, setting) if lr is None else lr
        return run_folder(options.out, name, rate, seed), rate

    world = setting.world_folder(options.worlds)
    started, done = time.monotonic(), 0
    with RankPool(1, init=False, timeout_s=options.timeout) as pool:
        for place, (name, lr, seed) in enumerate(runs := [*looked_at, *reported]):
            folder, rate = folder_of(name, lr, seed)
            if is_done(folder):
                continue
            setting.module.make(world, setting)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.jsonl").unlink(missing_ok=True)  # of a run that was cut off: it starts anew
            argv = flags_of(world, known[name], folder, seed=seed, lr=rate, setting=setting)
            pool.run(train, argv, known[name].others, str(folder / "train.log"))
            done += 1
            each = (time.monotonic() - started) / done
            left = time.strftime("%H:%M:%S", time.gmtime(each * (len(runs) - place - 1)))
            said = f"run {place + 1}/{len(runs)}  {name}, {rate:g}, seed {seed}  {each:.0f} s each  left {left}"
            print(said, file=sys.stderr, flush=True)


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; `setting` is the whole one, with what was changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--setting", choices=SETTINGS, default="share", help="a table of the report; the following change parts of it")
    for f in fields(Setting):
        several, kind = {"teacher": (2, float), "student": (2, float), "lrs": ("+", float)}.get(f.name, (None, None))
        kind = kind or type(f.default)
        add(f"--{f.name.replace('_', '-')}", type=kind, nargs=several, help=f.metadata["help"])
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--methods", nargs="+", help="names in study_runs.py; default: all")
    add("--worlds", type=Path, default=Path("runs/study/worlds"), help="folder of the worlds, each made once")
    add("--threads", type=int, default=1, help="threads of torch")
    add("--timeout", type=float, default=3600.0, help="seconds that one run may take")
    add("--out", type=Path, help="folder of the runs; default: runs/study/training-SETTING")
    add("--readme", type=Path, help="write the tables between its markers, and the figures beside it")
    add("--report", action="store_true", help="run nothing: tables of what is in --out, under the setting it has")
    add("--quick", action="store_true", help="few methods, one seed, fewer steps")
    options = parser.parse_args(argv)
    options.out = options.out or Path(f"runs/study/training-{options.setting}")
    changed = {f.name: value for f in fields(Setting) if (value := getattr(options, f.name)) is not None}
    if options.quick:
        whole = SETTINGS[options.setting]
        one_rate = (whole.lrs[len(whole.lrs) // 2],)
        changed = {"steps": 40, "world_steps": whole.world_steps // 2, "lrs": one_rate} | changed
        vars(options).update(seeds=[1], methods=QUICK_METHODS)
    changed = {name: tuple(value) if isinstance(value, list) else value for name, value in changed.items()}
    options.setting = replace(SETTINGS[options.setting], **changed)
    if options.setting.world not in WORLDS or options.setting.reward not in options.setting.module.REWARDS:
        parser.error(
            f"no world {options.setting.world!r} with reward {options.setting.reward!r}: worlds are "
            f"{', '.join(WORLDS)}, and each module has its REWARDS."
        )
    return options


if __name__ == "__main__":
    sys.exit(main())
