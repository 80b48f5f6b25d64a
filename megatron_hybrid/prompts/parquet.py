"""The records of a parquet file: one row, one record, its columns by name. Read with pyarrow, which is an extra."""

import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hybrid.errors import ConfigError, DataError

_ROWS_AT_ONCE = 1024
"""Held as Python objects besides the records that are kept."""


def parquet_records(path: Path) -> Iterator[tuple[int, Any]]:
    """(number of the row from 1, its columns); a ValueError stands for a row with a value that cannot be read.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: the file cannot be read.
    """
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        broken = importlib.import_module("pyarrow.lib").ArrowException
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the prompt file {path} is parquet, which needs the pyarrow package, and it is not installed: "
            "pip install 'megatron-hybrid[parquet]', or give a .jsonl file."
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _refuse_equal_names(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for row in _rows(batch, broken):
                    number += 1
                    yield number, row
    except (OSError, ValueError, OverflowError, MemoryError, broken) as error:
        if isinstance(error, DataError):
            raise
        where = f" behind row {number}" if number else ""
        raise DataError(f"cannot read the prompt file {path}{where}: {error}. Give a readable parquet file.") from error


def _refuse_equal_names(path: Path, names: list[str]) -> None:
    if len(set(names)) < len(names):
        name, times = Counter(names).most_common(1)[0]
        raise DataError(f"{path} has {times} columns that are called {name!r}: which of them counts? Name them apart.")


def _rows(batch: Any, broken: type[Exception]) -> list[Any]:
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError, broken):  # of one value, and nothing says of which
        return [_row(batch.slice(row, 1), broken) for row in range(len(batch))]


def _row(one: Any, broken: type[Exception]) -> Any:
    """The record of a batch of one row, or a ValueError that names the column that cannot be read."""
    record = {}
    for name, column in zip(one.schema.names, one.columns, strict=True):
        try:
            record[name] = column[0].as_py()
        except (ValueError, OverflowError, broken) as error:
            reason = f"not UTF-8, byte {error.start}" if isinstance(error, UnicodeDecodeError) else error
            return ValueError(f"{name!r} cannot be read ({reason})")
    return record
