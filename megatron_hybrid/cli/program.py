"""How a program on Megatron's command line starts and ends: alone or under a launcher, on a GPU or a CPU, with one
sentence for a mistake."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

_SINGLE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def run(
    program: Callable[[argparse.Namespace], None],
    add_arguments: Callable[[argparse.ArgumentParser], argparse.ArgumentParser],
) -> None:
    """`program(args)` with Megatron's parsed arguments and those that `add_arguments` adds.

    A mistake in settings or data, or a Megatron that lacks something, ends with one sentence and status 1.
    """
    if "RANK" not in os.environ:  # started by hand, not by a launcher
        os.environ.update({name: os.environ.get(name, value) for name, value in _SINGLE_PROCESS.items()})

    import megatron_hybrid as mh
    from megatron_hybrid.errors import HybridError
    from megatron_hybrid.mcore.plain_reading import plain_data_only
    from megatron_hybrid.mcore.symbols import borrow, check_apex, mismatch

    try:
        check_apex()  # before Megatron imports it
        mh.cpu.enable()
        with plain_data_only():  # --use-checkpoint-args reads the checkpoint of --load while arguments are parsed
            program(borrow("megatron.training.arguments", "parse_and_validate_args")(add_arguments))
    except HybridError as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "megatron":
            raise
        sys.exit(f"error: {mismatch(error.name or 'megatron', error)}")
