"""Where the files of a process are read from: /proc, or a folder that they were saved in."""

import errno
import io
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from operator import index
from pathlib import Path
from typing import Protocol, TypeVar

from pyreserve._system import proc
from pyreserve._system.limits import refusal
from pyreserve.errors import AccessError, MapsError, NoAddressSpaceError, OutOfMemoryError
from pyreserve.procmem.read.maps import ROW_BYTES, MapTable, Readable, Sums

Read = TypeVar("Read")

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
"""The files of a saved process: those of /proc/PID, then facts of its machine and its cgroup."""

_MISSING = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_PROGRAMS = 4  # that may take each other's place while a file is read
_TEXT_MOST = 1 << 22  # bytes of a file that is no table
_LARGEST = (1 << 31) - 1  # a pid_t
_LARGEST_TEXT = 1 << 24  # bytes of a saved file
_MACHINE = {
    "meminfo": Path("/proc/meminfo"),
    "max_map_count": Path("/proc/sys/vm/max_map_count"),
    "overcommit_memory": Path("/proc/sys/vm/overcommit_memory"),
    "core_pattern": Path("/proc/sys/kernel/core_pattern"),
}


@contextmanager
def naming_the_limit() -> Iterator[None]:
    """Raise an error that names the limit instead of an empty MemoryError.

    Where vm.max_map_count is reached, malloc can't map more memory.
    """
    ran_out = False
    try:
        yield
    except OutOfMemoryError:
        raise
    except MemoryError as error:
        ran_out = True
        traceback.clear_frames(error.__traceback__)  # what was read so far is in the way
    if ran_out:
        try:
            nbytes = proc.map_count() * ROW_BYTES
        except (OSError, MemoryError):
            nbytes = ROW_BYTES
        raise refusal("map", errno.ENOMEM, nbytes)


class Source(Protocol):
    """What can be read of a process."""

    def table(self, name: str) -> MapTable:
        """Read ``"maps"`` or ``"smaps"``."""

    def smaps(self) -> MapTable | None:
        """Read ``"smaps"``; None if there is none, though ``"maps"`` can be read."""

    def text(self, name: str) -> str | None:
        """Read one of `SAVED`; None if there is no such file."""


class LiveSource:
    """A running process.

    Its methods raise `NoAddressSpaceError` if it has ended or has no memory, `AccessError` if its
    files may not be read. Of a process whose maps can be read others may be missing: an older
    kernel has none, a sandbox hides them.

    Raises:
        TypeError, ValueError: `pid` is no process number.
        NoAddressSpaceError: no process number is that large.
    """

    def __init__(self, pid: int | None) -> None:
        if isinstance(pid, bool):
            msg = f"a process number is an integer, not {pid}"
            raise TypeError(msg)
        self.pid = os.getpid() if pid is None else index(pid)
        if self.pid <= 0:
            msg = f"a process number is positive, not {self.pid}"
            raise ValueError(msg)
        if self.pid > _LARGEST:
            msg = f"there is no such process: no number of one is larger than {_LARGEST}"
            raise NoAddressSpaceError(errno.ESRCH, msg)
        self._folder = Path("/proc", str(self.pid))

    @contextmanager
    def open(self, name: str) -> Iterator[io.FileIO]:
        """Open a file of /proc/PID without a buffer in between."""
        with self._explained(name), open(self._folder / name, "rb", buffering=0) as file:
            yield file

    def table(self, name: str) -> MapTable:
        """See `Source`. It is never empty."""
        with self.open(name) as file:
            table = MapTable.read(file)
        if not len(table):
            raise self.without_memory()
        return table

    def sums(self) -> Sums:
        """Add up its maps, in little memory."""
        with self.open("maps") as file:
            sums = MapTable.sums(file)
        if not sums.mappings:
            raise self.without_memory()
        return sums

    def smaps(self) -> MapTable | None:
        """See `Source`."""
        return self._if_there(lambda: self.table("smaps"))

    def _if_there(self, read: Callable[[], Read]) -> Read | None:
        """Return what `read` reads, or None where that can't be, but the maps can."""
        try:
            return read()
        except (AccessError, OSError) as error:
            if isinstance(error, NoAddressSpaceError) or error.errno not in _MISSING:
                raise
        with self.open("maps") as file:
            file.read(1)
        return None

    def again(self, read: Callable[[], Read]) -> Read:
        """Return what `read` reads; again if meanwhile a program took another's place (execve).

        Open files of /proc/PID are of the old one, which is gone, and not of the process.
        """
        for _ in range(_PROGRAMS):
            try:
                return read()
            except NoAddressSpaceError:
                if not self._has_memory():
                    raise
        return read()

    def _has_memory(self) -> bool:
        try:
            return b"\nVmSize:" in (self._folder / "status").read_bytes()
        except OSError:
            return False

    def text(self, name: str) -> str | None:
        """See `Source`."""
        if name in _MACHINE:
            try:
                return _MACHINE[name].read_text(encoding="utf-8", errors="replace")
            except (FileNotFoundError, PermissionError):  # a container may hide it
                return None
        if name == "maps":
            return self._text(name)
        return self._if_there(lambda: self._text(name))

    def _text(self, name: str) -> str:
        if name == "cgroup_memory":
            with self._explained("cgroup"):
                limits = proc.cgroup_memory(self.pid)
                return "".join(f"{limit} {used}\n" for limit, used in limits)
        with self.open(name) as file:
            return file.readall().decode(errors="surrogateescape")

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise self._not_there(name) from None
        except ProcessLookupError:
            raise self.without_memory() from None
        except PermissionError:
            owner = self._folder.stat().st_uid if self._folder.exists() else "another user"
            msg = (
                f"process {self.pid} belongs to user {owner}: reading its mappings takes root "
                "(CAP_SYS_PTRACE), or its own user if it is dumpable; a sandbox may refuse both"
            )
            raise AccessError(errno.EACCES, msg) from None

    def _not_there(self, name: str) -> AccessError | NoAddressSpaceError:
        if not any(Path("/proc", one).exists() for one in ("self", "stat", "version")):
            msg = "/proc is not mounted; it is the only source for a process's mappings"
            return AccessError(errno.ENOENT, msg)
        if self._has_memory() or self.pid == os.getpid():
            msg = f"{self._folder / name} is not there: this kernel or a sandbox does not show it"
            return AccessError(errno.ENOENT, msg)
        return self.without_memory()

    def without_memory(self) -> NoAddressSpaceError:
        """Make the error that says why there is nothing to read."""
        try:
            status = (self._folder / "status").read_bytes().decode(errors="replace")
        except OSError:
            msg = f"there is no process {self.pid}"
        else:
            if "\nState:\tZ" in status or "\nState:\tX" in status:
                msg = f"process {self.pid} has ended (a zombie): it has no memory any more"
            elif "\nPPid:\t2\n" in status or self.pid == 2:
                msg = f"process {self.pid} is a kernel thread: it has no address space of its own"
            else:
                msg = f"process {self.pid} has no address space: it has just ended"
        return NoAddressSpaceError(errno.ESRCH, msg)


class SavedSource:
    """A folder with files of `SAVED`, perhaps compressed (``.gz``). smaps or maps is required."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _find(self, name: str) -> Path | None:
        for path in (self._folder / name, self._folder / f"{name}.gz"):
            if path.is_file():
                return path
            if path.exists():  # a pipe would keep who reads it waiting, a device has no end
                msg = f"{path} is not a regular file"
                raise MapsError(msg)
        return None

    @contextmanager
    def _open(self, path: Path) -> Iterator[Readable]:
        import gzip  # noqa: PLC0415 - the library is imported more often than a file is unpacked
        import zlib  # noqa: PLC0415

        try:
            if path.suffix == ".gz":
                with gzip.open(path) as unpacked:
                    yield unpacked
            else:
                with path.open("rb", buffering=0) as file:
                    yield file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            msg = f"{path}: {error}"
            raise MapsError(msg) from None
        except MapsError as error:
            msg = f"{path}: {error}"
            raise MapsError(msg) from None

    def table(self, name: str) -> MapTable:
        """See `Source`.

        Raises:
            FileNotFoundError: it is not there.
            MapsError: it is no such file, or of a process without memory.
        """
        path = self._find(name)
        if path is None:
            what = (
                "no such folder" if not self._folder.is_dir() else f"no smaps, and no {name} either"
            )
            raise FileNotFoundError(errno.ENOENT, what, str(self._folder))
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
            found = bytearray()
            buffer = bytearray(1 << 16)
            while got := file.readinto(memoryview(buffer)):
                found += buffer[:got]
                if len(found) > _TEXT_MOST:
                    msg = f"larger than {name} ever is"
                    raise MapsError(msg)
            return found.decode(errors="surrogateescape")


def save(pid: int | None, folder: Path) -> None:
    """Write the files of a process into a folder, made if need be, to be explained elsewhere.

    Raises:
        NoAddressSpaceError, AccessError: see `LiveSource`.
        FileExistsError: one of them is there already; nothing was written.
        OSError: they can't be written.
    """
    for name in SAVED:
        if (folder / name).exists() or (folder / f"{name}.gz").exists():
            raise FileExistsError(errno.EEXIST, f"{name} is there already", str(folder))
    with naming_the_limit():
        texts = _texts_of_one_moment(LiveSource(pid))
    was_there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    try:
        for name, text in texts.items():
            with open(folder / name, "xb") as file:  # not through a link either
                written.append(folder / name)
                file.write(text.encode(errors="surrogateescape"))
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        if not was_there:
            with suppress(OSError):  # somebody else may have put something there
                folder.rmdir()
        raise


def _texts_of_one_moment(source: LiveSource) -> dict[str, str]:
    """Read all files, and again if the mappings changed meanwhile; some never rest."""
    for _ in range(5):
        texts, maps_after = source.again(lambda: _texts(source))
        if texts["maps"] == maps_after:
            break
    return texts


def _texts(source: LiveSource) -> tuple[dict[str, str], str]:
    """Read all files, and the maps once more."""
    texts = {name: text for name in SAVED if (text := source.text(name)) is not None}
    maps_after = source.text("maps") or ""
    # What ends meanwhile leaves empty files, or a status without sizes.
    if not (
        texts["maps"]
        and texts.get("smaps", "missing")
        and maps_after
        and "\nVmSize:" in texts.get("status", "\nVmSize:")
    ):
        raise source.without_memory()
    return texts, maps_after
