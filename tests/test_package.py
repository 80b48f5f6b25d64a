"""The package as one imports it: public names on first use, and no change of anybody else's modules."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_hybrid
from megatron_hybrid import HybridConfig, errors

ROOT = Path(__file__).parents[1]

SNAPSHOT = """
import sys, types
import torch, torch.distributed, transformers
import megatron.core.parallel_state, megatron.core.pipeline_parallel.schedules, megatron.training.training

def attributes():
    seen = {}
    for module in [m for m in list(sys.modules.values()) if isinstance(m, types.ModuleType)]:
        name = getattr(module, "__name__", "") or ""
        if name.split(".")[0] not in ("torch", "megatron"):
            continue
        for key, value in list(vars(module).items()):
            seen[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__ == name:
                seen |= {f"{name}.{key}.{inner}": held for inner, held in list(vars(value).items())}
    return seen

before = attributes()
import megatron_hybrid
values = [getattr(megatron_hybrid, name) for name in megatron_hybrid.__all__]
after = attributes()
assert len(before) > 10_000, len(before)
changed = [name for name, value in before.items() if after.get(name) is not value]
# A new name in an old place is a change too, unless it is a submodule, which any import leaves there.
owners = {name.rpartition(".")[0] for name in before}
changed += [
    name for name, value in after.items()
    if name not in before and name.rpartition(".")[0] in owners and not isinstance(value, types.ModuleType)
]
print("changed:", sorted(changed))
"""


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_neither_torch_nor_megatron() -> None:
    heavy = "{'torch', 'megatron', 'transformers', 'numpy'}"
    code = f"import sys, megatron_hybrid as mh; mh.HybridConfig(); mh.errors; print({heavy} & set(sys.modules))"
    assert python(code) == "set()"


def test_a_public_name_is_the_object_of_its_home() -> None:
    from megatron_hybrid import config

    assert HybridConfig is config.HybridConfig
    assert errors is sys.modules["megatron_hybrid.errors"]


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="no attribute 'HybridConfg'; it has .*HybridConfig"):
        _ = megatron_hybrid.HybridConfg


def test_dir_lists_every_public_name() -> None:
    assert set(megatron_hybrid.__all__) <= set(dir(megatron_hybrid))


def test_editors_are_told_the_same_names_as_users() -> None:
    tree = ast.parse((ROOT / "megatron_hybrid" / "__init__.py").read_text())
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {alias.asname for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told | {"__version__"} == set(megatron_hybrid.__all__)


def test_every_folder_of_the_package_is_installed() -> None:
    """setup.py's find_packages leaves out folders without an __init__.py, and an import in the checkout hides it."""
    folders = {path.parent for path in (ROOT / "megatron_hybrid").rglob("*.py")}
    assert [folder.name for folder in folders if not (folder / "__init__.py").exists()] == []


def test_setup_reads_the_version_without_importing() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == megatron_hybrid.__version__


def test_importing_every_public_name_changes_nothing_in_torch_or_megatron() -> None:
    assert python(SNAPSHOT) == "changed: []"
