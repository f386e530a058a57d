"""Columns of Parquet files as arrays, a batch of rows in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from vlaopt.errors import InputError
from vlaopt.optional import require
from vlaopt.tensors import Array

_ROWS_LIMIT = 100_000_000
_GROUP_LIMIT = 8 << 30
"""Bytes that one row group's columns may say they unpack to."""
_BATCH = 64


def column_names(file: IO[bytes], path: Path) -> list[str]:
    """The names of a file's columns. Raises InputError when it is unsound."""
    with _opened(file, path) as parquet:
        return list(parquet.schema_arrow.names)


def read_columns(file: IO[bytes], names: Sequence[str], path: Path) -> dict[str, Any]:
    """Whole columns as Arrow arrays, by name. Raises InputError when the file is unsound or lacks one."""
    with _opened(file, path) as parquet:
        _check_names(parquet, names, path)
        _check_size(parquet, range(parquet.metadata.num_row_groups), names, path)
        table = parquet.read(columns=list(names))
        return {name: table.column(name).combine_chunks() for name in names}


def read_cells(file: IO[bytes], name: str, rows: Sequence[int], path: Path) -> Iterator[Any]:
    """The cells of a column at `rows`, which ascend, as Arrow arrays of length one."""
    with _opened(file, path) as parquet:
        _check_names(parquet, [name], path)
        wanted = iter(rows)
        row = next(wanted, None)
        begin = 0
        for group in range(parquet.metadata.num_row_groups):
            end = begin + parquet.metadata.row_group(group).num_rows
            if row is not None and row < end:
                _check_size(parquet, [group], [name], path)
                place = begin
                for batch in parquet.iter_batches(batch_size=_BATCH, row_groups=[group], columns=[name]):
                    column = batch.column(batch.schema.get_field_index(name))
                    while row is not None and row < place + len(column):
                        yield column.slice(row - place, 1)
                        row = next(wanted, None)
                    place += len(column)
                    if row is None or row >= end:
                        break
            begin = end
        if row is not None:
            raise InputError(f"no row {row}, it has {begin}", where=str(path))


def to_numpy(column: Any, shape: tuple[int, ...], *, where: str) -> Array:
    """An Arrow array of numbers, or of lists of them, [rows, *shape]. Raises InputError for gaps and other shapes."""
    arrow = require("pyarrow", "data")
    rows = len(column)
    if isinstance(column, arrow.ExtensionArray):
        column = column.storage
    while (
        arrow.types.is_list(column.type)
        or arrow.types.is_large_list(column.type)
        or arrow.types.is_fixed_size_list(column.type)
    ):
        if column.null_count:
            break
        column = column.flatten()
    numbers = (
        arrow.types.is_integer(column.type)
        or arrow.types.is_floating(column.type)
        or arrow.types.is_boolean(column.type)
    )
    if column.null_count or not numbers or len(column) != rows * int(np.prod(shape)):
        raise InputError(
            f"{len(column)} values of {column.type}, {column.null_count} missing, for {rows} rows of {list(shape)}",
            where=where,
        )
    values: Array = column.to_numpy(zero_copy_only=False)
    return values.reshape(rows, *shape)


@contextmanager
def _opened(file: IO[bytes], path: Path) -> Iterator[Any]:
    parquet = require("pyarrow.parquet", "data")
    arrow = require("pyarrow", "data")
    try:
        yield parquet.ParquetFile(file)
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"not a sound Parquet file: {reason}",
            where=str(path),
            hint="fetch the file again (git lfs pull where it is a pointer)",
        ) from error


def _check_names(parquet: Any, names: Sequence[str], path: Path) -> None:
    for name in names:
        if parquet.schema_arrow.get_field_index(name) < 0:
            raise InputError(f"has no column {name!r}", where=str(path))


def _check_size(parquet: Any, groups: Sequence[int], names: Sequence[str], path: Path) -> None:
    metadata, size = parquet.metadata, 0
    for group in groups:
        columns = (metadata.row_group(group).column(index) for index in range(metadata.num_columns))
        size += sum(
            column.total_uncompressed_size
            for column in columns
            if any(f"{column.path_in_schema}.".startswith(f"{name}.") for name in names)
        )
    if metadata.num_rows > _ROWS_LIMIT or size > _GROUP_LIMIT:
        raise InputError(f"says it unpacks to {size} bytes in {metadata.num_rows} rows", where=str(path))
