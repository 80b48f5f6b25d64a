"""Model folders on disk: Hugging Face to Megatron, back, and a Megatron checkpoint with fewer layers.

Each function reads, renames and writes, and tells `on_stage` which of the three begins. A Megatron checkpoint made here
carries what rebuilds it without another file: arguments, true and padded vocabulary, tokenizer and its fingerprint.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hybrid.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_hybrid.checkpoint.fingerprint import tokenizer_fingerprint
from megatron_hybrid.checkpoint.hf_config import hf_config_to_megatron_args, megatron_args_to_hf_config
from megatron_hybrid.checkpoint.prune import drop_layers, num_layers
from megatron_hybrid.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

STAGES = ("reading", "renaming", "writing")
OnStage = Callable[[str], None]


def _silent(stage: str) -> None:
    """Nobody watches."""


def hf_folder_to_megatron(
    load: str | Path,
    save: str | Path,
    *,
    pad_vocab_to: int | None = None,
    tokenizer_model: str | None = None,
    dtype: str = "float32",
    on_stage: OnStage = _silent,
) -> dict[str, Any]:
    """Writes the Megatron checkpoint `save` from the Hugging Face folder `load`; returns the arguments stored in it.

    pad_vocab_to     rows of the embedding; None: the vocabulary rounded up to 128
    tokenizer_model  stored as given; None: the absolute path of `load`
    dtype            of the stored weights, float32 or bfloat16
    """
    import torch
    from transformers import AutoTokenizer

    from megatron_hybrid.mcore.checkpoint_io import save_megatron_checkpoint

    on_stage("reading")
    hf_state, config = load_hf_folder(load)
    args = hf_config_to_megatron_args(config, pad_vocab_to=pad_vocab_to)
    args["tokenizer_type"] = "HuggingFaceTokenizer"
    args["tokenizer_model"] = tokenizer_model or str(Path(load).resolve())
    args["hybrid_tokenizer_fingerprint"] = tokenizer_fingerprint(AutoTokenizer.from_pretrained(str(load)))
    on_stage("renaming")
    state = {name: value.to(getattr(torch, dtype)) for name, value in hf_to_megatron(hf_state, args).items()}
    on_stage("writing")
    save_megatron_checkpoint(save, state, args)
    return args


def megatron_folder_to_hf(
    load: str | Path, save: str | Path, *, tokenizer: str | Path | None = None, on_stage: OnStage = _silent
) -> dict[str, Any]:
    """Writes the Hugging Face folder `save` from the Megatron checkpoint `load`; returns its config.json.

    tokenizer  Hugging Face folder of the tokenizer; None: the one the checkpoint names

    Raises:
        DataError: `save` holds a model already, or the checkpoint cannot be written as one.
    """
    from transformers import AutoTokenizer

    from megatron_hybrid.mcore.checkpoint_io import load_megatron_state

    _refuse_a_folder_with_a_model(save)
    on_stage("reading")
    state, args = load_megatron_state(load)
    folder = str(tokenizer or args.get("tokenizer_model"))
    try:
        hf_tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise DataError(
            f"no Hugging Face tokenizer can be read from {folder} (the checkpoint's is {args.get('tokenizer_type')} "
            f"{args.get('tokenizer_model')}): {error}. Give the folder of one with the same ids as --tokenizer."
        ) from error
    on_stage("renaming")
    if args.get("vocab_size") is None:  # as Megatron's training leaves it, unless --vocab-size was given
        args["vocab_size"] = len(hf_tokenizer)
    special = {name: getattr(hf_tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # A tokenizer may add a token for padding that the model has no row for: transformers then builds no model.
    special = {name: i if i is not None and i < args["vocab_size"] else None for name, i in special.items()}
    config = {**megatron_args_to_hf_config(args), **special}
    hf_state = megatron_to_hf(state, args)
    on_stage("writing")
    save_hf_folder(save, hf_state, config)
    hf_tokenizer.save_pretrained(str(save))
    return config


def prune_megatron_folder(
    load: str | Path, save: str | Path, *, drop: Iterable[int], on_stage: OnStage = _silent
) -> dict[str, Any]:
    """Writes the Megatron checkpoint `save`: `load` without the layers `drop` (from 0); returns its arguments."""
    from megatron_hybrid.mcore.checkpoint_io import load_megatron_state, save_megatron_checkpoint

    on_stage("reading")
    state, args = load_megatron_state(load)
    on_stage("renaming")
    pruned = drop_layers(state, drop)
    on_stage("writing")
    args = {**args, "num_layers": num_layers(pruned)}
    save_megatron_checkpoint(save, pruned, args)
    return args


def load_hf_folder(folder: str | Path) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """State dict and config.json of a Hugging Face folder with safetensors files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").exists():
        raise DataError(
            f"{folder} should hold config.json and *.safetensors, found "
            f"{sorted(p.name for p in folder.glob('*'))[:8]}: save the model with save_pretrained(), which writes both."
        )
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{file} is no whole safetensors file ({error}): copy or download it again.") from error
    return state, read_hf_config(folder)


def read_hf_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder.

    Raises:
        DataError: it is no JSON object.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{folder / 'config.json'} cannot be read ({error}): copy or download it again.") from error
    if not isinstance(config, dict):
        raise DataError(f"{folder / 'config.json'} is a JSON {type(config).__name__}, not an object of settings.")
    return config


def _refuse_a_folder_with_a_model(folder: str | Path) -> None:
    found = sorted(path.name for pattern in ("config.json", "*.safetensors") for path in Path(folder).glob(pattern))
    if found:
        raise DataError(
            f"{folder} holds a model already ({', '.join(found[:4])}): files of it that are not overwritten would be "
            "read as part of the new one. Give a folder that is not there yet, or remove it."
        )


def save_hf_folder(folder: str | Path, state: "Mapping[str, Tensor]", config: Mapping[str, Any]) -> None:
    """Writes config.json and model.safetensors as transformers reads them."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    save_file(
        {name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n", encoding="utf-8")
