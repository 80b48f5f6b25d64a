"""The list of what is borrowed from Megatron is the truth: the package is read with ast and compared with it."""

import ast
import importlib.util
from pathlib import Path

import pytest

from megatron_hybrid.mcore import symbols

PACKAGE = Path(symbols.__file__).parents[1]
README = Path(symbols.__file__).with_name("README.md").read_text(encoding="utf-8")
CHECKED = README.partition("## Stood in for")[0]
"""What is checked; behind it is what is stood in for without a GPU."""


def is_megatron(module: str) -> bool:
    return module.split(".")[0] == "megatron"


def string(node: ast.AST) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def called(node: ast.AST, *names: str) -> list[str] | None:
    """The string arguments of a call of one of `names`, bare or as an attribute; None for anything else."""
    if not isinstance(node, ast.Call):
        return None
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return [string(argument) for argument in node.args] if name in names else None


def borrowed_by(source: str) -> set[tuple[str, str]]:
    """(module, name) of what a file takes: imported names, attributes of imported modules, `borrow("module", "x")`."""
    tree = ast.parse(source)
    taken: set[tuple[str, str]] = set()
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and is_megatron(node.module or ""):
            for alias in node.names:
                path = f"{node.module}.{alias.name}"
                if importlib.util.find_spec(str(node.module)) and is_module(path):
                    modules[alias.asname or alias.name] = path
                else:
                    taken.add((str(node.module), alias.name))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not is_megatron(alias.name), f"line {node.lineno}: import the name, so that it can be listed"
        elif (pair := called(node, "borrow")) and is_megatron(pair[0]):
            taken.add((pair[0], pair[1]))
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if (
                (found := called(node.value, "import_module"))
                and is_megatron(found[0])
                and isinstance(target, ast.Name)
            ):
                modules[target.id] = found[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            taken.add((modules[node.value.id], node.attr))
    return taken


def is_module(path: str) -> bool:
    try:
        return importlib.util.find_spec(path) is not None
    except ModuleNotFoundError:  # the parent is a module, not a package
        return False


def borrowed_by_the_package() -> set[tuple[str, str]]:
    # runtime/cpu.py stands in for names that matter without a GPU only; README.md lists them apart.
    files = [path for path in PACKAGE.rglob("*.py") if "runtime" not in path.relative_to(PACKAGE).parts]
    assert len(files) > 50, "the test reads the wrong folder"
    return set().union(*(borrowed_by(path.read_text(encoding="utf-8")) for path in files))


def test_every_form_of_borrowing_is_seen():
    source = """
from megatron.core import parallel_state as groups
from megatron.core.utils import unwrap_model
training: Any = importlib.import_module("megatron.training.training")
def late():
    borrow("megatron.training", "get_args")()
    training.pretrain(groups.get_model_parallel_group(), other.thing)
"""
    assert borrowed_by(source) == {
        ("megatron.core.parallel_state", "get_model_parallel_group"),
        ("megatron.core.utils", "unwrap_model"),
        ("megatron.training", "get_args"),
        ("megatron.training.training", "pretrain"),
    }


def test_the_list_holds_exactly_what_the_package_borrows():
    assert borrowed_by_the_package() == set(symbols.BORROWED)


def test_the_list_is_sorted_and_has_nothing_twice():
    assert list(symbols.BORROWED) == sorted(set(symbols.BORROWED))


@pytest.mark.parametrize(("module", "name"), symbols.BORROWED)
def test_the_readme_gives_a_reason_for_each_symbol(module, name):
    rows = [line for line in CHECKED.splitlines() if line.startswith(f"| `{module}.{name}` |")]
    assert len(rows) == 1, f"megatron_hybrid/mcore/README.md needs one row for {module}.{name}"


def test_the_readme_lists_no_symbol_that_is_not_borrowed():
    listed = {line.split("`")[1] for line in CHECKED.splitlines() if line.startswith("| `megatron.")}
    assert listed == {f"{module}.{name}" for module, name in symbols.BORROWED}


def test_the_readme_names_the_versions_that_were_seen():
    for version in (symbols.SEEN_VERSIONS, *symbols.ALSO_SEEN):
        assert f"**{version}**" in README
