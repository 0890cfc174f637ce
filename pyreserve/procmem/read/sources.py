"""Read the files of a process: from /proc, or from a folder where `save` wrote them."""

import errno
import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from operator import index
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeVar

from pyreserve._system import proc
from pyreserve._system.limits import refusal
from pyreserve._system.maps import ROW_BYTES, MapTable, Readable, Sums
from pyreserve.errors import AccessError, MapsError, NoAddressSpaceError, OutOfMemoryError

if TYPE_CHECKING:
    from pathlib import Path

Result = TypeVar("Result")

SAVED = (
    "maps",
    "smaps",
    "smaps_rollup",
    "status",
    "limits",
    "meminfo",
    "max_map_count",
    "overcommit_memory",
    "core_pattern",
    "cgroup_memory",
)
"""The files of a saved process: those of /proc/PID, then those of its machine and its cgroup."""

_UNREADABLE = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EINVAL,
}
_EXEC_RETRIES = 4
_MAX_TEXT = 1 << 22  # bytes; for files other than maps and smaps
_MAX_PID = (1 << 31) - 1  # pid_t
_MACHINE = {
    "meminfo": "meminfo",
    "max_map_count": "sys/vm/max_map_count",
    "overcommit_memory": "sys/vm/overcommit_memory",
    "core_pattern": "sys/kernel/core_pattern",
}
"""The files of /proc that are the machine's, and not the process's."""


@contextmanager
def name_exhausted_limit() -> Iterator[None]:
    """Replace a MemoryError by an OutOfMemoryError that names the limit.

    At vm.max_map_count malloc can't map memory, so that even small allocations fail.
    """
    ran_out = False
    try:
        yield
    except OutOfMemoryError:
        raise
    except MemoryError as error:
        ran_out = True
        _clear_frames(error.__traceback__)  # frees what was read so far
    if ran_out:
        try:
            nbytes = proc.map_count() * ROW_BYTES
        except (OSError, MemoryError):
            nbytes = ROW_BYTES
        raise refusal("map", errno.ENOMEM, nbytes)


def _clear_frames(trace: TracebackType | None) -> None:
    """Like `traceback.clear_frames`, whose module is slow to import."""
    while trace is not None:
        with suppress(RuntimeError):  # a frame that still runs
            trace.tb_frame.clear()
        trace = trace.tb_next


class Source(Protocol):
    """The readable files of a process."""

    def table(self, name: str) -> MapTable:
        """Read ``"maps"`` or ``"smaps"``."""

    def smaps(self) -> MapTable | None:
        """Read ``"smaps"``; None if only ``"maps"`` can be read."""

    def text(self, name: str) -> str | None:
        """Read one of `SAVED`; None if it can't be read."""


class LiveSource:
    """A running process.

    Its methods raise `NoAddressSpaceError` if the process has ended or has no memory, `AccessError`
    if its files may not be read. Even if maps is readable, other files may be missing: older
    kernels lack them, and a sandbox may hide them.

    Raises:
        TypeError, ValueError: `pid` is not a positive integer.
        NoAddressSpaceError: `pid` is larger than any process number.
    """

    def __init__(self, pid: int | None) -> None:
        if isinstance(pid, bool):
            msg = f"pid must be an integer, got {pid}"
            raise TypeError(msg)
        self.pid = os.getpid() if pid is None else index(pid)
        if self.pid <= 0:
            msg = f"pid must be positive, got {self.pid}"
            raise ValueError(msg)
        if self.pid > _MAX_PID:
            msg = f"there is no such process: pid must be at most {_MAX_PID}"
            raise NoAddressSpaceError(errno.ESRCH, msg)

    @contextmanager
    def open(self, name: str) -> Iterator[io.FileIO]:
        """Open a file of /proc/PID unbuffered."""
        with self._translate_errors(name), proc.open_file(f"{self.pid}/{name}") as file:
            yield file

    def table(self, name: str) -> MapTable:
        """See `Source`. The table is never empty."""
        with self.open(name) as file:
            table = MapTable.read(file)
        if not len(table):
            raise self.no_address_space_error()
        return table

    def sums(self) -> Sums:
        """Add up maps; see `MapTable.sums`."""
        with self.open("maps") as file:
            sums = MapTable.sums(file)
        if not sums.mappings:
            raise self.no_address_space_error()
        return sums

    def smaps(self) -> MapTable | None:
        """See `Source`."""
        return self._read_if_present(lambda: self.table("smaps"))

    def _read_if_present(self, read: Callable[[], Result]) -> Result | None:
        """Return the result of `read`, or None if it can't read its file but maps is readable."""
        try:
            return read()
        except (AccessError, OSError) as error:
            if isinstance(error, NoAddressSpaceError) or error.errno not in _UNREADABLE:
                raise
        with self.open("maps") as file:
            file.read(1)
        return None

    def retry_after_exec(self, read: Callable[[], Result]) -> Result:
        """Return the result of `read`; call it again if the process ran execve during the call.

        Open files of /proc/PID belong to the old program's address space, which is then gone.
        """
        for _ in range(_EXEC_RETRIES):
            try:
                return read()
            except NoAddressSpaceError:
                if not self._has_memory():
                    raise
        return read()

    def _has_memory(self) -> bool:
        try:
            return "VmSize" in proc.status(self.pid)
        except OSError:
            return False

    def text(self, name: str) -> str | None:
        """See `Source`."""
        if name in _MACHINE:
            try:
                return proc.text(_MACHINE[name])
            except (FileNotFoundError, PermissionError):  # hidden by a container
                return None
        if name == "maps":
            return self._text(name)
        return self._read_if_present(lambda: self._text(name))

    def _text(self, name: str) -> str:
        if name == "cgroup_memory":
            with self._translate_errors("cgroup"):
                limits = proc.cgroup_memory(self.pid)
                return "".join(f"{limit} {used}\n" for limit, used in limits)
        with self.open(name) as file:
            return file.readall().decode(errors="surrogateescape")

    @contextmanager
    def _translate_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise self._missing_file(name) from None
        except ProcessLookupError:
            raise self.no_address_space_error() from None
        except PermissionError:
            owner = "another user"
            with suppress(OSError):  # it has just ended
                owner = f"user {proc.user_of(self.pid)}"
            msg = (
                f"process {self.pid} belongs to {owner}: reading its mappings takes root "
                "(CAP_SYS_PTRACE), or its own user if it is dumpable; a sandbox may refuse both"
            )
            raise AccessError(errno.EACCES, msg) from None

    def _missing_file(self, name: str) -> AccessError | NoAddressSpaceError:
        if not proc.is_mounted():
            msg = "/proc is not mounted; it is the only source for a process's mappings"
            return AccessError(errno.ENOENT, msg)
        if self._has_memory() or self.pid == os.getpid():
            msg = f"/proc/{self.pid}/{name} is missing: this kernel lacks it, or a sandbox hides it"
            return AccessError(errno.ENOENT, msg)
        return self.no_address_space_error()

    def no_address_space_error(self) -> NoAddressSpaceError:
        """Return the error that says why the process has nothing to read."""
        try:
            status = proc.status(self.pid)
        except OSError:
            msg = f"there is no process {self.pid}"
        else:
            if status.get("State", "").startswith(("Z", "X")):
                msg = f"process {self.pid} has ended (a zombie): its memory is gone"
            elif status.get("PPid") == "2" or self.pid == 2:
                msg = f"process {self.pid} is a kernel thread: it has no address space of its own"
            else:
                msg = f"process {self.pid} has no address space: it has just ended"
        return NoAddressSpaceError(errno.ESRCH, msg)


class SavedSource:
    """A folder with files of `SAVED`, plain or compressed (``.gz``). smaps or maps is required."""

    def __init__(self, folder: "str | Path") -> None:
        self._folder = os.fspath(folder) or "."

    def _find(self, name: str) -> str | None:
        for path in _names(self._folder, name):
            try:
                mode = os.stat(path).st_mode
            except ValueError:  # a path with a null byte
                continue
            except OSError as error:
                if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
                    continue
                raise
            if stat.S_ISREG(mode):
                return path
            # Reading a pipe blocks, and a device may be endless.
            msg = f"{path} is not a regular file"
            raise MapsError(msg)
        return None

    @contextmanager
    def _open(self, path: str) -> Iterator[Readable]:
        import gzip  # noqa: PLC0415 - slow to import, rarely needed
        import zlib  # noqa: PLC0415

        try:
            if path.endswith(".gz"):
                with gzip.open(path) as unpacked:
                    yield unpacked
            else:
                with open(path, "rb", buffering=0) as file:
                    yield file
        except (gzip.BadGzipFile, EOFError, zlib.error, MapsError) as error:
            msg = f"{path}: {error}"
            raise MapsError(msg) from None

    def table(self, name: str) -> MapTable:
        """See `Source`.

        Raises:
            FileNotFoundError: there is no such file.
            MapsError: the file is malformed or has no mappings.
        """
        path = self._find(name)
        if path is None:
            msg = "neither smaps nor maps" if os.path.isdir(self._folder) else "no such folder"
            raise FileNotFoundError(errno.ENOENT, msg, self._folder)
        with self._open(path) as file:
            table = MapTable.read(file)
            if not len(table):
                msg = "no mappings: the process had ended"
                raise MapsError(msg)
            return table

    def smaps(self) -> MapTable | None:
        """See `Source`."""
        return self.table("smaps") if self._find("smaps") else None

    def text(self, name: str) -> str | None:
        """See `Source`."""
        path = self._find(name)
        if path is None:
            return None
        with self._open(path) as file:
            text = bytearray()
            buffer = bytearray(1 << 16)
            while nbytes := file.readinto(memoryview(buffer)):
                text += buffer[:nbytes]
                if len(text) > _MAX_TEXT:
                    msg = f"{name} must be at most {_MAX_TEXT:,} bytes"
                    raise MapsError(msg)
            return text.decode(errors="surrogateescape")


def _names(folder: str, name: str) -> tuple[str, str]:
    """Return the paths that a saved file may have: plain and compressed."""
    path = os.path.join(folder, name)
    return path, f"{path}.gz"


def save(pid: int | None, folder: "str | Path") -> None:
    """Write the files of a process into a folder, for ``explain(path=folder)`` on any machine.

    The folder is created if necessary. A failed call leaves no files.

    Raises:
        TypeError, ValueError, NoAddressSpaceError, AccessError: see `LiveSource`.
        FileExistsError: one of the files exists already.
        OSError: a file can't be written.
        OutOfMemoryError: memory ran out; the error names the limit.
    """
    folder = os.fspath(folder) or "."
    for name in SAVED:
        if any(map(os.path.exists, _names(folder, name))):
            raise FileExistsError(errno.EEXIST, f"{name} exists already", folder)
    with name_exhausted_limit():
        texts = _read_consistent_texts(LiveSource(pid))
    existed = os.path.exists(folder)
    os.makedirs(folder, exist_ok=True)
    written: list[str] = []
    try:
        for name, text in texts.items():
            path = os.path.join(folder, name)
            with open(path, "xb") as file:  # x: do not follow a link
                written.append(path)
                file.write(text.encode(errors="surrogateescape"))
    except BaseException:
        for path in written:
            with suppress(FileNotFoundError):
                os.unlink(path)
        if not existed:
            with suppress(OSError):  # another process may have put files there
                os.rmdir(folder)
        raise


def _read_consistent_texts(source: LiveSource) -> dict[str, str]:
    """Read all files, up to five times until the mappings did not change during the reading."""
    for _ in range(5):
        texts, maps_after = source.retry_after_exec(lambda: _read_texts(source))
        if texts["maps"] == maps_after:
            break
    return texts


def _read_texts(source: LiveSource) -> tuple[dict[str, str], str]:
    """Read all files, then maps once more."""
    texts = {name: text for name in SAVED if (text := source.text(name)) is not None}
    maps_after = source.text("maps") or ""
    # A process that ends during this leaves empty files, or a status without sizes.
    if not (
        texts["maps"]
        and texts.get("smaps", "missing")
        and maps_after
        and ("status" not in texts or "VmSize" in proc.parse_status(texts["status"]))
    ):
        raise source.no_address_space_error()
    return texts, maps_after
