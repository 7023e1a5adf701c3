"""Files that are whole or absent: written beside their place, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from driftrl.checks import InputError


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace the file at ``path`` by one that holds ``text``, atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def write_json(path: Path, data: Any) -> None:
    """Replace the file at ``path`` by ``data`` as JSON, atomically."""
    write_text(path, json.dumps(data, indent=1) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder that takes ``path``'s place when everything in it is on disk.

    A folder already at ``path`` is replaced. If the body raises, nothing changes. Who may read the files is as the process
    has it for new ones (umask).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():  # whoever may read the folder may read what is in it: safetensors are written for their owner alone
                file.chmod(temporary.stat().st_mode & 0o666)
            _flush(file)
        _flush(temporary)
        if path.exists():
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sort_header(path: Path) -> None:
    """Sort the keys of a safetensors file's header, which otherwise follow a random hash; no tensor changes.

    So equal tensors make equal files, byte for byte.
    """
    with path.open("r+b") as file:  # in place, for the tensors may be most of the memory there is
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"{path}: its sorted header takes {len(text)} bytes, and there are {size}")
        file.seek(8)
        file.write(text.ljust(size))


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def numbers_in(files: Iterable[Path]) -> int:
    """How many numbers the tensors of safetensors files have, by their headers; a file that is none has none."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
        except (OSError, SafetensorError):
            continue
    return total


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        InputError: if the file is missing or no JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON file; {_no_json(error)}") from error


def _no_json(error: Exception) -> str:
    """Why a file is none, in words of ours."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "got a folder"
    if isinstance(error, OSError):
        return f"it cannot be read: {error.strerror or error}"
    if isinstance(error, json.JSONDecodeError):
        place = f"line {error.lineno}, column {error.colno}"
        return f"got one that is not JSON at {place}" if error.doc.strip() else "got one that is empty"
    return (
        "got one that is not text" if isinstance(error, UnicodeDecodeError) else "got one nested too deeply"
    )


def make_parent(out: Path) -> None:
    """Make the folder that a page or picture goes to, before the work that it shows is done.

    Raises:
        InputError: if that cannot be.
    """
    _make(out.parent, out)


def make_folder(out: Path) -> None:
    """Make the folder that results go to, before the work that leads to them is done.

    Raises:
        InputError: if that cannot be, or nothing can be written into it.
    """
    _make(out, out)


def _make(folder: Path, out: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written: {error.strerror or error}") from error
