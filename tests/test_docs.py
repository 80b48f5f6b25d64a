"""The pages name every setting and every metric, and link to what is there."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.metrics import MEANINGS
from megatron_hybrid.online_config import OnlineConfig

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "SCALING.md",
    "COMING_FROM.md",
    "examples/README.md",
    "megatron_hybrid/README.md",
    "megatron_hybrid/mcore/README.md",
    "megatron_hybrid/train/README.md",
)
SETTINGS = {f.name.replace("_", "-") for config in (HybridConfig, OnlineConfig) for f in fields(config)}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def flag_rows() -> list[list[str]]:
    """Cells of the rows between README's headings of the flags and of what comes after them."""
    text = read("README.md").partition("## Flags")[2].partition("## What to change first")[0]
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]


def test_readme_has_a_row_for_every_setting():
    named = {name for cells in flag_rows() for name in re.findall(r"`([^`]+)`", cells[0])}
    assert named >= SETTINGS, f"README.md lacks {sorted(SETTINGS - named)}"


@pytest.mark.parametrize("config", [HybridConfig, OnlineConfig])
def test_defaults_are_as_readme_has_them(config: type):
    found = {cells[0].split("<br>")[0]: cells[1] for cells in flag_rows() if len(cells) > 2}
    checked = 0
    for f in fields(config):
        default = {None: "unset", False: "off"}.get(f.default, f.default)
        alone = found.get(f"`{f.name.replace('_', '-')}`")
        if alone is not None:
            assert alone.strip("`") == str(default), f.name
            checked += 1
    assert checked > 5


def test_the_page_of_metrics_has_all_of_them():
    text = read("megatron_hybrid/train/README.md")
    assert not [name for name in MEANINGS if f"`{name}" not in text]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", read(page)):
        assert "://" in target or ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", ["SCALING.md", "COMING_FROM.md", "megatron_hybrid/train/README.md"])
def test_flags_of_ours_that_a_page_names_exist(page: str):
    for name in re.findall(r"--hybrid-([a-z-]+[a-z])", read(page)):
        assert name in SETTINGS, name
