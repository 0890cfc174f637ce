"""Atomic writing of output files."""

import os
import secrets
import sys
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file completely or not at all: a failed call leaves the old file unchanged.

    A symbolic link is followed and kept, and the file keeps its permission bits. A path that is not
    a regular file (``/dev/null``, a pipe) or that names standard output or error (``/dev/stdout``)
    is written in place.

    Raises:
        OSError: the file cannot be written.
    """
    stream = _stream(path)
    if stream is not None:
        for buffered in (sys.stdout, sys.stderr):
            if buffered is not None:
                buffered.flush()
        with open(stream, "wb", closefd=False) as file:
            file.write(data)
        return
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path = Path(os.path.realpath(path))
    part = path.parent / f".{secrets.token_hex(8)}.part"
    try:
        with part.open("xb") as file:
            file.write(data)
        if path.exists():
            part.chmod(path.stat().st_mode & 0o777)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def check_writable(path: Path) -> None:
    """Check that `write_bytes` can write `path`, as far as that is visible without writing.

    Raises:
        PermissionError: `path` is a directory, an existing file without write permission, or in a
            directory that is missing or not writable.
    """
    if _stream(path) is not None:
        return
    targets = [path] if path.exists() else []
    if path.is_file() or not targets:  # a regular file is replaced, by a new one beside it
        targets.append(Path(os.path.realpath(path)).parent)
    if path.is_dir() or not all(os.access(target, os.W_OK) for target in targets):
        msg = f"{path} can't be written"
        raise PermissionError(msg)


def _stream(path: Path) -> int | None:
    """Return 1 or 2 if the path names standard output or error, else None."""
    for number in (1, 2):
        try:
            if os.path.samestat(path.stat(), os.fstat(number)):
                return number
        except OSError:
            continue
    return None
