"""Depth pruning: a shorter student from a deep model, by leaving whole transformer layers out.

Residual layers near the middle change the stream least (arXiv 2403.03853), so a model without some of them still
speaks, only worse: a student whose recovery under a teacher can be watched. Names are Megatron's on disk, as
`convert.py` and `mcore/checkpoint_io.py` use them.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_hybrid.errors import DataError

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")


def num_layers(state: Mapping[str, Any]) -> int:
    """Layers a Megatron state dict holds."""
    found = {int(match[1]) for name in state if (match := _LAYER.match(name))}
    if found != set(range(len(found))):
        raise DataError(f"layers should be numbered 0 to {len(found) - 1} without gaps, got {sorted(found)}.")
    return len(found)


def drop_layers(state: Mapping[str, Any], layers: Iterable[int]) -> dict[str, Any]:
    """`state` without `layers` (numbered from 0), the rest renumbered in order. Tensors are shared, not copied."""
    dropped = set(layers)
    count = num_layers(state)
    unknown = sorted(dropped - set(range(count)))
    if unknown:
        raise DataError(f"cannot drop layers {unknown}: the checkpoint has layers 0 to {count - 1}.")
    if len(dropped) == count:
        raise DataError(f"dropping all {count} layers leaves no model: keep at least one.")
    new_number = {old: new for new, old in enumerate(n for n in range(count) if n not in dropped)}
    pruned = {}
    for name, value in state.items():
        match = _LAYER.match(name)
        if match is None:
            pruned[name] = value
        elif int(match[1]) in new_number:
            pruned[f"decoder.layers.{new_number[int(match[1])]}.{match[2]}"] = value
    return pruned
