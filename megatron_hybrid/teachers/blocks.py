"""Rows of a teacher's logits that are worked on at once, so that what is made of them costs no memory of their size.

Data in: a shape and a device.  Data out: slices of rows.  No collective.
"""

from torch import Tensor

_BLOCK_ELEMENTS = {"cpu": 1 << 18}
"""Logits at once, by kind of device: on a CPU they and what is made of them stay in cache."""
_BLOCK_ELEMENTS_ELSEWHERE = 1 << 24
"""64 MB in fp32: an accelerator wants few, large launches."""


def row_blocks(logits: Tensor) -> list[slice]:
    """Slices of the rows of logits [n, v/tp], in order; an empty one where there are none."""
    rows = max(1, _BLOCK_ELEMENTS.get(logits.device.type, _BLOCK_ELEMENTS_ELSEWHERE) // max(1, logits.shape[1]))
    return [slice(start, start + rows) for start in range(0, max(1, len(logits)), rows)]
