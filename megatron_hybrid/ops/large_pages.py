"""New tensors of a CPU in large pages, where Linux gives them to who asks: mapping pages of 4 KB is slow.

Data out: an uninitialised tensor, whose memory is asked for in pages of 2 MB before anything is written to it. Where
they are refused, or are what every process gets, nothing changes; nor do other devices, whose memory torch keeps.
No collective.
"""

import ctypes
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_PAGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14
"""Of Linux on any processor."""
_advise = None
if sys.platform == "linux":
    _advise = ctypes.CDLL(None).madvise
    _advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty."""
    made = torch.empty(shape, dtype=dtype, device=device)
    if _advise is None or device.type != "cpu" or type(made) is not Tensor or made.nbytes < _PAGE_BYTES:
        return made  # a fake tensor has no memory
    begin = -(-made.data_ptr() // _PAGE_BYTES) * _PAGE_BYTES
    end = (made.data_ptr() + made.nbytes) // _PAGE_BYTES * _PAGE_BYTES
    if begin < end:
        _advise(begin, end - begin, _MADV_HUGEPAGE)
    return made
