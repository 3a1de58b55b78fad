"""Data in blocks of rows that can be read again: what does not fit into memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data._utils.collate import default_collate  # what a DataLoader does to rows

from pyroem.errors import DataError, SettingError

ROWS = 65_536


class Blocks:
    """A sequence of blocks, each the positional arguments of the program for some of the rows.

    Made by :func:`blocks`. Every pass over the data reads it from the start; ``length`` is the
    number of rows and ``pick`` reads single rows, where the source can tell.
    """

    def __init__(
        self,
        read: Callable[[], Iterator[tuple[Any, ...]]],
        length: int | None = None,
        pick: Callable[[Tensor], tuple[Any, ...]] | None = None,
    ) -> None:
        self.read, self.length, self.pick = read, length, pick

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return self.read()


def blocks(
    source: Any,
    *,
    rows: int = ROWS,
    columns: Sequence[str] | None = None,
) -> Blocks:
    """Make a source of data that a fit reads block by block, again in every pass.

    It is given to ``fit`` in place of the data: ``fit(model, blocks(source))``.

    Parameters
    ----------
    source
        An array or tensor with the rows in its first dim, or a tuple of them (the program's
        arguments): ``numpy.memmap`` too, which is read from its file without being mapped; a
        ``torch.utils.data`` ``Dataset`` or ``DataLoader`` (its batches are the blocks); a function
        that returns a new iterator of blocks each time that it is called; the path of a ``.npy``
        or a ``.parquet`` file (which needs ``pyarrow``), or of several parquet files.
    rows
        The number of rows of a block, where the source does not make blocks itself.
    columns
        The columns of a parquet file, in order; all by default. They become one matrix.

    Raises:
    ------
    SettingError, DataError
        For a source of another kind, arrays of different lengths, files that are not there.
    """
    if isinstance(source, Blocks):
        return source
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise SettingError(f"blocks: rows must be a positive integer, got {rows!r}.")
    if isinstance(source, (str, os.PathLike)):
        return _of_file(Path(source), rows, columns)
    if (
        isinstance(source, (list, tuple))
        and source
        and all(isinstance(s, (str, os.PathLike)) for s in source)
    ):
        return _of_parquet([Path(s) for s in source], rows, columns)
    if isinstance(source, DataLoader):
        return Blocks(lambda: (_arguments(batch) for batch in source))
    if isinstance(source, IterableDataset):
        loader: DataLoader[Any] = DataLoader(source, batch_size=rows)
        return Blocks(lambda: (_arguments(batch) for batch in loader))
    if isinstance(source, Dataset) or _is_dataset(source):
        return _of_dataset(source, rows)
    if callable(source):
        return Blocks(lambda: (_arguments(block) for block in source()))
    arrays = source if isinstance(source, tuple) else (source,)
    if all(hasattr(a, "shape") and len(a.shape) for a in arrays) and arrays:
        return _of_arrays(arrays, rows)
    raise SettingError(
        "blocks: expected arrays, a torch Dataset or DataLoader, a function that returns an"
        f" iterator of blocks, or the path of a .npy or .parquet file; got {type(source).__name__}."
        " (An iterator can be read once only; wrap it in a function that makes it anew.)"
    )


def is_source(x: Any) -> bool:
    """Whether ``fit`` takes ``x`` for blocks without being told."""
    return isinstance(x, (Blocks, np.memmap, Dataset, DataLoader))


def _is_dataset(x: Any) -> bool:
    return (
        hasattr(x, "__getitem__")
        and hasattr(x, "__len__")
        and not hasattr(x, "shape")
        and (not isinstance(x, (tuple, list, dict)))
    )


def _arguments(block: Any) -> tuple[Any, ...]:
    return tuple(block) if isinstance(block, (tuple, list)) else (block,)


def _of_arrays(arrays: tuple[Any, ...], rows: int) -> Blocks:
    length = int(arrays[0].shape[0])
    for i, array in enumerate(arrays):
        if int(array.shape[0]) != length:
            raise DataError(
                f"blocks: array {i} has {int(array.shape[0])} rows, but the first has {length}."
            )

    def read() -> Iterator[tuple[Any, ...]]:
        for start in range(0, length, rows):
            yield tuple(_slice(a, start, min(start + rows, length)) for a in arrays)

    def pick(index: Tensor) -> tuple[Any, ...]:
        return tuple(_rows(a, index) for a in arrays)

    return Blocks(read, length, pick)


def _rows(array: Any, index: Tensor) -> Any:
    """Single rows of an array."""
    if isinstance(array, Tensor):
        return array[index]
    if not _is_plain(array):
        return np.array(array[index.numpy()])
    return np.concatenate([_slice(array, i, i + 1) for i in index.tolist()])


def _is_plain(array: Any) -> bool:
    """Whether an array is a whole mapped file, whose rows lie one after another."""
    mapped = isinstance(array, np.memmap) and type(array.base).__name__ == "mmap"
    return mapped and array.flags.c_contiguous and array.filename is not None


def _slice(array: Any, start: int, stop: int) -> Any:
    """Some rows of an array; those of a mapped file are read, so that no page of it stays."""
    if _is_plain(array):
        size = array[0].size
        found = np.fromfile(
            array.filename,
            dtype=array.dtype,
            count=(stop - start) * size,
            offset=array.offset + start * size * array.dtype.itemsize,
        )
        return found.reshape((stop - start, *array.shape[1:]))
    part = array[start:stop]
    return part if isinstance(part, Tensor) else np.asarray(part)


def _of_dataset(source: Any, rows: int) -> Blocks:
    length = len(source)

    def collected(index: Iterable[int]) -> tuple[Any, ...]:
        return _arguments(default_collate([source[i] for i in index]))

    def read() -> Iterator[tuple[Any, ...]]:
        for start in range(0, length, rows):
            yield collected(range(start, min(start + rows, length)))

    return Blocks(read, length, lambda index: collected(index.tolist()))


def _of_file(path: Path, rows: int, columns: Sequence[str] | None) -> Blocks:
    if path.suffix == ".npy":
        try:
            return _of_arrays((np.load(path, mmap_mode="r"),), rows)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as a .npy file: {error}") from error
    if path.suffix in (".parquet", ".pq"):
        return _of_parquet([path], rows, columns)
    raise SettingError(f"blocks: expected a .npy or a .parquet file, got '{path}'.")


def _of_parquet(paths: list[Path], rows: int, columns: Sequence[str] | None) -> Blocks:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise SettingError(
            "Reading parquet files needs pyarrow: pip install 'pyroem[parquet]'."
        ) from error
    length = 0
    for path in paths:
        try:
            length += parquet.ParquetFile(path).metadata.num_rows
            known = parquet.ParquetFile(path).schema_arrow.names
        except Exception as error:
            raise DataError(f"{path}: cannot be read as a parquet file: {error}") from error
        lacking = [c for c in columns or () if c not in known]
        if lacking:
            raise DataError(
                f"{path}: there is no column '{lacking[0]}'; it has {', '.join(known)}."
            )

    def read() -> Iterator[tuple[Any, ...]]:
        for path in paths:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=rows, columns=columns):
                    names = batch.schema.names
                    parts = [_numbers(path, n, c) for n, c in zip(names, batch, strict=True)]
                    yield (torch.stack(parts, 1),)

    return Blocks(read, length)


def _numbers(path: Path, name: str, column: Any) -> Tensor:
    try:
        return torch.as_tensor(np.array(column.to_numpy(zero_copy_only=False), dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: column '{name}' is not numeric ({column.type}).") from error
