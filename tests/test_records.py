"""Records are frozen, say what each field holds, and cost no import of torch."""

import ast
import subprocess
import sys
from dataclasses import FrozenInstanceError, is_dataclass
from pathlib import Path

import pytest

from megatron_hybrid import records
from megatron_hybrid.records import Prompt

SOURCE = Path(records.__file__)
RECORDS = [value for value in vars(records).values() if isinstance(value, type) and is_dataclass(value)]


def test_importing_the_records_does_not_import_torch() -> None:
    code = "import sys, megatron_hybrid.records; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SOURCE.parents[1], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_a_record_cannot_be_changed_on_its_way(record: type) -> None:
    assert record.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_prompts_do_not_share_their_entry() -> None:
    first, second = (Prompt(prompt_id=i, token_ids=(1, 2), text="2 + 2?", task="sums") for i in range(2))
    first.entry["answer"] = "4"
    assert second.entry == {}
    with pytest.raises(FrozenInstanceError):
        first.prompt_id = 3  # type: ignore[misc]


def test_every_tensor_of_a_record_says_its_shape() -> None:
    tensors, silent = 0, []
    for record in [node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.ClassDef)]:
        for position, field in enumerate(record.body):
            if isinstance(field, ast.AnnAssign) and ast.unparse(field.annotation) == "Tensor":
                tensors += 1
                below = record.body[position + 1] if position + 1 < len(record.body) else None
                if not (isinstance(below, ast.Expr) and "[" in ast.unparse(below)):
                    silent.append(f"{record.name}.{ast.unparse(field.target)}")
    assert tensors > 10, "the test no longer finds the fields"
    assert silent == []
