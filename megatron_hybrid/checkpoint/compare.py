"""Does a Megatron checkpoint compute what its Hugging Face folder computes? Logits of both on one text, in fp32."""

from pathlib import Path

from megatron_hybrid.errors import DataError

TOLERANCE = 1e-5
"""Of the largest logit. Two implementations of one network differ in fp32 by the order of their sums, about sqrt(terms
x layers) roundings of 6e-8 (seen: 1e-6 for tiny models, 2e-6 for SmolLM2); a wrong epsilon, rotary base or head order
moves logits by 1e-2 and more."""

TEXT = "The cat sat on the mat, and 12 + 30 = 42."


def compare_logits(hf_folder: str | Path, megatron_folder: str | Path, *, text: str = TEXT) -> float:
    """Largest difference of the logits of transformers and of Megatron's GPTModel, over the largest logit.

    Raises:
        DataError: it is above TOLERANCE.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_hybrid.mcore.checkpoint_io import load_megatron_state, megatron_logits

    tokens = AutoTokenizer.from_pretrained(str(hf_folder))(text, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(str(hf_folder), dtype=torch.float32, use_safetensors=True)(
            tokens
        ).logits
    state, args = load_megatron_state(megatron_folder)
    logits = megatron_logits(state, args, tokens)[..., : expected.shape[-1]]
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise DataError(
            f"the logits of {megatron_folder} differ from those of {hf_folder} by {difference:.1e} of the largest, "
            f"more than rounding ({TOLERANCE:.0e}): one of them is not the other's conversion, or an argument is "
            "missing."
        )
    return difference
