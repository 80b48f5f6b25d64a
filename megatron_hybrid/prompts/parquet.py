"""The records of a parquet file: one row, one record, its columns by name. Read with pyarrow, which is an extra."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hybrid.errors import ConfigError, DataError


def parquet_records(path: Path) -> Iterator[tuple[int, Any]]:
    """(number of the row from 1, its columns).

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: the file cannot be read.
    """
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the prompt file {path} is parquet, which needs the pyarrow package, and it is not installed: "
            "pip install 'megatron-hybrid[parquet]', or give a .jsonl file."
        ) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # ArrowInvalid, of a file that is no parquet, is a ValueError
        raise DataError(f"cannot read the prompt file {path}: {error}. Give a readable parquet file.") from error
    yield from enumerate(rows, start=1)
