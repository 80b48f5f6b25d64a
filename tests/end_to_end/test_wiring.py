"""What the examples ask for exists, without the training: flags that Megatron's and our parser know and settings that
go together, and no step of a script reads what no step before it has made.
"""

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_hybrid.cli.arguments import add_hybrid_args, hybrid_config_from_args
from megatron_hybrid.online_config import OnlineConfig

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PYTHONS_PLACE = """#!{python}
import json, sys
open({record!r}, "a").write(json.dumps(sys.argv[1:]) + "\\n")
"""
"""Says what it was to run, and runs nothing."""
READS = ("--load", "--input", "--data-path", "--hf", "--megatron", "--hybrid-teacher-load", "--tokenizer-model")
WRITES = ("--save", "--output-prefix")


@pytest.fixture(scope="module")
def parser():
    return add_hybrid_args(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def settings(parser, words):
    """The online settings of a command line, after every flag was known and every setting valid."""
    args = parser.parse_args(words)
    assert not args.hybrid or hybrid_config_from_args(args) is not None
    return OnlineConfig.from_args(args)


def values(command, *flags):
    return [word for flag, word in zip(command, command[1:], strict=False) if flag in flags]


def commands_of(script, folder):
    """The arguments of each Python that a script would start in `folder`, in order."""
    stand_in, record = folder / "python", folder / "commands"
    stand_in.write_text(PYTHONS_PLACE.format(python=sys.executable, record=str(record)))
    stand_in.chmod(0o755)
    knobs = os.environ | {"PYTHON": str(stand_in), "RUN_DIR": str(folder / "run"), "MODELS": str(folder / "models")}
    done = subprocess.run([EXAMPLES / script, "--train-iters", "3"], env=knobs, capture_output=True, text=True)
    return [json.loads(line) for line in record.read_text().splitlines()], done


@pytest.mark.parametrize("example", ["1_imitate_on_cpu", "2_hybrid_on_cpu", "3_tensor_parallel", "4_pipeline_parallel"])
def test_flags_of_the_examples_in_python_exist_and_go_together(parser, monkeypatch, example):
    monkeypatch.syspath_prepend(EXAMPLES)
    import tiny_world

    flags = runpy.run_path(str(EXAMPLES / f"{example}.py"))["FLAGS"]
    data = "--hybrid-prompts a.jsonl --hybrid-eval-prompts b.jsonl --hybrid-teacher-load teacher"
    common = f"{tiny_world.MODEL} {tiny_world.CPU}"
    assert settings(parser, f"{common} {data} {flags}".split()).teacher_load == "teacher"
    assert settings(parser, f"{common} {tiny_world.TEACHER}".split()).prompts is None


@pytest.mark.parametrize(
    ("script", "trainer", "steps"),
    [
        ("5_from_a_text_corpus.sh", "examples/pretrain_gpt.py", 6),
        ("6_smollm2_recovery.sh", "megatron_hybrid.cli.train", 5),
    ],
)
def test_flags_of_the_scripts_exist_and_every_step_reads_what_was_made_before(parser, tmp_path, script, trainer, steps):
    commands, done = commands_of(script, tmp_path)
    assert len(commands) == steps, done.stderr
    made = {str(tmp_path / "run" / "data")}  # of arithmetic_corpus.py, whose only argument is its folder
    for command in commands:
        for path in values(command, *READS):
            assert any(path == one or path.startswith(f"{one}/") for one in made), (path, command)
        made |= set(values(command, *WRITES))
        assert command[0] == "-m" or (ROOT / command[0]).is_file()
    words = [command[command.index(trainer) + 1 :] for command in commands if trainer in command]
    online = [settings(parser, one) for one in words]
    assert online[-1].prompts is not None and online[-1].teacher_load in made
    assert words[-1][-2:] == ["--train-iters", "3"], "what a user types comes last and wins"


def test_example_5_removes_nothing_that_it_has_not_made(tmp_path):
    mine = tmp_path / "run" / "data" / "precious"
    mine.mkdir(parents=True)
    commands = tmp_path / "commands"
    commands.touch()
    asked, done = commands_of("5_from_a_text_corpus.sh", tmp_path)
    assert (done.returncode, asked) == (2, [])
    assert "holds files that this script has not made" in done.stderr
    assert mine.exists()
    shutil.rmtree(mine.parent)
    for _ in range(2):  # an empty folder, and then one of its own
        commands.write_text("")
        asked, _ = commands_of("5_from_a_text_corpus.sh", tmp_path)
        assert asked
