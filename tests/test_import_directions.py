"""Imports run one way: every import of the package is read with ast and held against the table below.

`late` means inside a function: such an import costs nothing until it is used, and cannot make a cycle. What stands
under TYPE_CHECKING is never executed, so it may name any outside package, but it still has to keep the direction.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "megatron_hybrid"
TORCH_LEAVES = {"records", "parallel", "collectives", "metrics"}
LEAVES = {"errors", "annealing", "weighted", "config", "online_config"} | TORCH_LEAVES
ANYTHING = None


@dataclass(frozen=True)
class Rule:
    """What a room may import. `rooms` and `outside` at any place, the late ones only inside functions."""

    rooms: set[str]
    late_rooms: frozenset[str] = frozenset()
    outside: set[str] | None = ANYTHING
    """Top-level packages beside the standard library; None: any but megatron (and torch where it is forbidden)."""
    late_outside: frozenset[str] = frozenset()
    never_at_import: frozenset[str] = frozenset({"megatron"})


TORCH = {"torch"}
RULES = {
    "errors": Rule(set(), outside=set()),
    "annealing": Rule({"errors"}, outside=set()),
    "weighted": Rule({"errors"}, outside=set()),
    "config": Rule({"errors", "annealing"}, outside=set()),
    "online_config": Rule({"errors", "weighted", "config"}, outside=set()),
    **{leaf: Rule({"errors"} | TORCH_LEAVES, outside=TORCH) for leaf in TORCH_LEAVES},
    "ops": Rule(LEAVES - {"config", "online_config"}, outside=TORCH, late_outside=frozenset({"triton"})),
    "ops/triton_kernels": Rule({"ops"}, outside={"triton"}),  # needs it to define kernels; is imported late itself
    "ops/triton_mixture_kernels": Rule({"ops"}, outside={"triton"}),  # the same
    "returns": Rule(LEAVES, outside=TORCH),
    "runtime": Rule(LEAVES, late_outside=frozenset({"megatron"})),
    "mcore": Rule(LEAVES | {"runtime"}, never_at_import=frozenset()),
    "servers": Rule({"errors", "online_config"}, outside={"urllib3"}),
    "prompts": Rule(LEAVES),
    "rewards": Rule(LEAVES | {"servers"}),
    "rollouts": Rule(LEAVES | {"servers", "runtime", "mcore"}),
    "teachers": Rule(LEAVES | {"servers", "runtime", "mcore"}),
    "schedule": Rule(LEAVES | {"ops", "mcore"}, never_at_import=frozenset()),
    "checkpoint": Rule(LEAVES | {"mcore"}),
    "train": Rule(
        LEAVES
        | {
            "servers",
            "ops",
            "returns",
            "runtime",
            "mcore",
            "prompts",
            "rewards",
            "rollouts",
            "teachers",
            "schedule",
            "checkpoint",
        }
    ),
    "cli": Rule(
        {"config", "online_config", "errors"},
        late_rooms=frozenset({"mcore", "train", PACKAGE}),  # its main reads like a user's own script
        never_at_import=frozenset({"megatron", "torch", "transformers"}),
        late_outside=frozenset({"torch", "transformers"}),
    ),
}


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name; `late`: inside a function; `typing`: under TYPE_CHECKING."""

    name: str
    line: int
    late: bool
    typing: bool

    @property
    def room(self) -> str | None:
        """The room or leaf of this package, None for a name from outside or the package itself."""
        parts = self.name.split(".")
        return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def imports_of(path: Path, module: str) -> list[Import]:
    """Every import of a file, also relative ones and `import_module("...")` of a constant."""

    def visit(node: ast.AST, late: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, late, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base == PACKAGE:  # `from megatron_hybrid import errors`: each name may be a room
                yield from (Import(f"{base}.{alias.name}", node.lineno, late, typing) for alias in node.names)
            else:
                yield Import(base, node.lineno, late, typing)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(node.args[0].value, node.lineno, late, typing)
        inside = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside, typing or (guarded and child in node.body))  # type: ignore[attr-defined]

    return list(visit(ast.parse(path.read_text(encoding="utf-8")), late=False, typing=False))


def complaint(room: str, found: Import) -> str | None:
    """Why `room` may not have this import, or None."""
    rule = RULES[room]
    top = found.name.split(".")[0]
    if top == PACKAGE:
        target = found.room or PACKAGE
        if target == room or target in rule.rooms or (found.late and target in rule.late_rooms):
            return None
        if target == PACKAGE:
            return "imports the package itself, which leads everywhere: name the module"
        return f"may not import {target}" + (" at its top" if target in rule.late_rooms else "")
    if found.typing or top in sys.stdlib_module_names or (found.late and top in rule.late_outside):
        return None
    if top in rule.never_at_import or (rule.outside is not ANYTHING and top not in rule.outside):
        return f"may not import {top}" + (" at its top" if top in rule.late_outside else "")
    return None


def complaints_about(root: Path) -> list[str]:
    """All breaches in the package below `root`, each as `file:line: room ...`."""
    breaches = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        inside = path.relative_to(root).with_suffix("").parts
        if inside == (PACKAGE, "__init__"):
            continue  # the public names lead to every room, late; tests/test_package.py holds it to that
        file = "/".join(inside[1:])
        room = file if file in RULES else inside[1]
        if room not in RULES:
            breaches.append(f"{path.relative_to(root)}: {room} is not in the table: say what it may import")
            continue
        for found in imports_of(path, ".".join(inside)):
            if text := complaint(room, found):
                breaches.append(f"{path.relative_to(root)}:{found.line}: {room} {text}")
    return breaches


def test_the_package_keeps_its_directions() -> None:
    assert (ROOT / PACKAGE / "errors.py").exists(), "the test reads the wrong folder"
    assert complaints_about(ROOT) == []


def test_the_table_itself_has_no_cycle_between_rooms() -> None:
    rank = {room: position for position, room in enumerate(RULES)}
    for room, rule in RULES.items():
        if room not in TORCH_LEAVES:  # these may know each other; Python itself finds a cycle of top-level imports
            assert all(rank[target] < rank[room] for target in rule.rooms), room


def test_tools_and_examples_use_no_private_name() -> None:
    for path in [*(ROOT / "tools").glob("*.py"), *(ROOT / "examples").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                assert not [name for name in names if name.startswith("_")], f"{path.name}:{node.lineno}"


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("errors.py", "import torch", "errors may not import torch"),
        ("config.py", "from megatron_hybrid.records import Prompt", "config may not import records"),
        ("records.py", "from . import config", "records may not import config"),
        ("ops/api.py", "from megatron_hybrid import config", "ops may not import config"),
        ("ops/api.py", "from ..returns import weights", "ops may not import returns"),
        ("ops/api.py", "import triton.language as tl", "ops may not import triton at its top"),
        ("returns/weights.py", "import numpy", "returns may not import numpy"),
        ("runtime/cpu.py", "import megatron.core", "runtime may not import megatron at its top"),
        ("mcore/model.py", "import megatron_hybrid.schedule.inject", "mcore may not import schedule"),
        ("rewards/http.py", "def f():\n    import megatron.core", "rewards may not import megatron"),
        ("teachers/frozen.py", "from megatron_hybrid.rollouts.generate import Sampler", "may not import rollouts"),
        ("checkpoint/convert.py", "importlib.import_module('megatron.core')", "checkpoint may not import megatron"),
        ("schedule/inject.py", "if TYPE_CHECKING:\n    from megatron_hybrid.train import loop", "may not import train"),
        ("train/loop.py", "import megatron_hybrid", "train imports the package itself"),
        ("train/loop.py", "def f():\n    from megatron_hybrid.cli import train", "train may not import cli"),
        ("cli/train.py", "from megatron_hybrid.train import loop", "cli may not import train at its top"),
        ("cli/train.py", "import megatron_hybrid as mh", "cli imports the package itself"),
        ("cli/train.py", "import torch", "cli may not import torch at its top"),
        ("attic/old.py", "", "attic is not in the table"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, file: str, source: str, expected: str) -> None:
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (found,) = complaints_about(tmp_path)
    assert expected in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("records.py", "if TYPE_CHECKING:\n    import numpy\nimport torch\nfrom .errors import ShapeError"),
        ("ops/api.py", "def f():\n    import triton\nimport math, torch\nfrom .reference import judge"),
        ("runtime/cpu.py", "def f():\n    from megatron.core import parallel_state"),
        ("schedule/inject.py", "import megatron.core\nfrom megatron_hybrid.ops.api import hybrid_loss"),
        ("cli/train.py", "from megatron_hybrid import config\ndef main():\n    import megatron_hybrid.train.loop"),
        ("cli/train.py", "def main():\n    import megatron_hybrid as mh"),
    ],
)
def test_what_the_table_allows_passes(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert complaints_about(tmp_path) == []
