"""Plain values in files: what a checkpoint is made of, and how it stays whole on the disk.

A file holds tensors and plain Python values only, so that reading it runs no code
(``torch.load(weights_only=True)``).
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyroem.errors import SettingError
from pyroem.loop import Record, Status

FORMAT = 1
KIND = "__kind__"
BROKEN = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError, OSError),
    *(KeyError, IndexError, TypeError, ValueError, AttributeError),
)


def pack(value: Any) -> Any:
    """Dataclasses, records and statuses as plain dicts and tuples around the tensors."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Enum):
        return {KIND: "Status", "value": value.value}
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: pack(getattr(value, f.name)) for f in fields(value)}
        return {KIND: type(value).__name__, **own}
    if isinstance(value, Mapping):
        return {pack(k): pack(v) for k, v in value.items()}
    if isinstance(value, Record):
        return {KIND: "Record", "values": tuple(value)}
    if isinstance(value, (tuple, list)):
        return type(value)(pack(v) for v in value)
    if value is None or isinstance(value, (bool, torch.dtype)):
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)  # a number of NumPy's would need NumPy to be read
    raise SettingError(
        f"checkpoint: a state that holds a {type(value).__name__} cannot be written to a file."
    )


def unpack(value: Any, kinds: Mapping[str, Callable[..., Any]]) -> Any:
    """What :func:`pack` was given; ``kinds`` are the dataclasses by name."""
    if isinstance(value, dict):
        own = {k: unpack(v, kinds) for k, v in value.items()}
        if KIND not in own:
            return own
        kind = own.pop(KIND)
        if kind == "Status":
            return Status(own["value"])
        if kind == "Record":
            return Record(*own["values"])
        return kinds[kind](**own)
    if isinstance(value, (tuple, list)):
        return type(value)(unpack(v, kinds) for v in value)
    return value


def check_path(path: Any, every: Any) -> Path | None:
    """Where to write, made sure of before any work is done that could be lost."""
    if isinstance(every, bool) or not isinstance(every, (int, float)) or not every >= 0:
        raise SettingError(f"checkpoint_every must be a number of seconds >= 0, got {every!r}.")
    if path is None:
        return None
    if isinstance(path, bool) or not isinstance(path, (str, os.PathLike)) or not str(path):
        raise SettingError(f"checkpoint must be the path of a file, got {path!r}.")
    path = Path(path)
    if path.is_dir():
        raise SettingError(f"checkpoint: {path} is a folder; give the path of a file.")
    if not path.parent.is_dir():
        raise SettingError(f"checkpoint: there is no folder {path.parent}.")
    try:
        with _beside(path).open("wb"):
            pass
        _beside(path).unlink()
    except OSError as error:
        raise SettingError(f"checkpoint: {path} cannot be written: {error.strerror}.") from error
    return path


def write(path: Path, content: Any) -> None:
    """Write a file that is always whole: the old one stays until the new one is on the disk."""
    new = _beside(path)
    try:
        with new.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
    with suppress(OSError):  # not every system lets a folder be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Path) -> dict[str, Any] | None:
    """The content of a checkpoint; None where there is no file."""
    if not path.exists():
        return None
    message = (
        f"checkpoint {path}: not a file that fit(checkpoint=...) wrote, or a damaged one. Move it"
        " away to start anew."
    )
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            whole = archive.testzip() is None
        content = torch.load(path, map_location="cpu", weights_only=True) if whole else None
        found = None if content is None else content["format"]
    except BROKEN as error:
        raise SettingError(message) from error
    if content is None:
        raise SettingError(message)
    if found != FORMAT:
        raise SettingError(
            f"checkpoint {path}: written in format {found!r} by another version of pyroem; this one"
            f" reads format {FORMAT}."
        )
    return dict(content)


def _beside(path: Path) -> Path:
    """The new file until it is whole: in the same folder, so that renaming it is one step."""
    return path.with_name(f".{path.name}.new")
