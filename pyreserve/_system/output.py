"""Writing a file whole or not at all."""

import os
import secrets
import sys
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: what failed leaves the old one as it was.

    A link stays one, and who may read and write the file stays. What exists and is no regular file
    (``/dev/null``, a pipe), and what is standard output or error under another name
    (``/dev/stdout``), is written to as it is.

    Raises:
        OSError: it can't be written.
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
    made = path.parent / f".{secrets.token_hex(8)}.part"
    try:
        with made.open("xb") as file:
            file.write(data)
        if path.exists():
            made.chmod(path.stat().st_mode & 0o777)
        made.replace(path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def check_writable(path: Path) -> None:
    """Refuse what `write_bytes` could not write, as far as can be seen without writing.

    Raises:
        PermissionError: it is a directory, it or the directory that it is in is not there or not
            writable: a file that there is already is replaced.
    """
    if _stream(path) is not None:
        return
    needed = [path] if path.exists() else []
    if path.is_file() or not needed:
        needed.append(Path(os.path.realpath(path)).parent)
    if path.is_dir() or not all(os.access(one, os.W_OK) for one in needed):
        msg = f"{path} can't be written"
        raise PermissionError(msg)


def _stream(path: Path) -> int | None:
    """Return the number of the standard stream that a path is a name of, None if of none."""
    for number in (1, 2):
        try:
            if os.path.samestat(path.stat(), os.fstat(number)):
                return number
        except OSError:
            continue
    return None
