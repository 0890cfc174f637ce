"""What ``pyreserve vsz`` finds out: one object, for the screen and for JSON alike."""

import errno
import gc
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyreserve._arena.arena import Arena, FellBack
from pyreserve._system import proc
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.errors import OutOfMemoryError
from pyreserve.layouts import GO_PAGE, LayoutName, Piece
from pyreserve.units import MiB, format_size, round_up

if TYPE_CHECKING:
    from typing_extensions import Self

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How large this process is at one moment, in KiB (Committed_AS: the whole system).

    PSS is None where neither smaps_rollup nor smaps can be read.
    """

    vm_size_kib: int
    vm_rss_kib: int
    pss_kib: int | None
    committed_as_kib: int

    @classmethod
    def take(cls) -> "Snapshot":
        """Read /proc."""
        status = proc.status_kib()
        return cls(
            status["VmSize"],
            status["VmRSS"],
            _pss_kib(),
            proc.meminfo_kib()["Committed_AS"],
        )

    def to_dict(self) -> dict[str, int | None]:
        """As in /proc, with the unit in the name."""
        return {
            "VmSize_kib": self.vm_size_kib,
            "VmRSS_kib": self.vm_rss_kib,
            "Pss_kib": self.pss_kib,
            "Committed_AS_kib": self.committed_as_kib,
        }


def _pss_kib() -> int | None:
    try:
        return proc.rollup_kib().get("Pss", 0)
    except OSError:  # Linux before 4.14, a sandbox; the import would grow what is measured
        from pyreserve.procmem.read.sampling import resident  # noqa: PLC0415
        from pyreserve.procmem.read.sources import LiveSource  # noqa: PLC0415

        return resident(LiveSource(None))[1]


@dataclass(frozen=True, slots=True)
class VszReport:
    """What was reserved, and what that did. Addresses are ints."""

    pid: int
    layout: str
    requested_layout: str
    strategy: str
    fell_back: FellBack | None
    start: int
    end: int
    arena_start: int
    arena_used: int
    touched: int
    before: Snapshot
    after: Snapshot
    ps_before: tuple[int, int] | None
    ps_after: tuple[int, int] | None
    maps: list[Piece]

    def to_json(self) -> str:
        """As ``pyreserve vsz --json`` prints it."""
        fell_back = self.fell_back
        found: dict[str, Any] = {
            "layout": self.layout,
            "requested_layout": self.requested_layout,
            "strategy": self.strategy,
            "fell_back": fell_back and {"because": fell_back.because, "limit": fell_back.limit},
            "reservation": {"start": self.start, "end": self.end},
            "arena_start": self.arena_start,
            "arena_used": self.arena_used,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "maps": [
                [f"{piece.start:08x}-{piece.end:08x}", piece.perms, piece.what]
                for piece in self.maps
            ],
        }
        return json.dumps(found, indent=2)


class VszRun:
    """A layout, made for as long as the ``with`` block lasts."""

    def __init__(self, layout: LayoutName, size: int | None) -> None:
        """Choose what to reserve; see `pyreserve.Arena`."""
        self._layout, self._size = layout, size
        self._arena: Arena | None = None

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._arena is not None:
            self._arena.release()

    def measure(self, touch: int, progress: Progress) -> VszReport:
        """Reserve, grow by the first MiB and touch `touch` bytes more, between two snapshots."""
        _refuse_too_much(touch)
        self._rehearse()
        ps_before = ps(os.getpid())
        before = Snapshot.take()
        arena = self._arena = Arena(self._size, layout=self._layout)
        arena.grow(MiB)
        _touch(arena, touch, progress)
        after = Snapshot.take()
        placement = arena.placement
        return VszReport(
            pid=os.getpid(),
            layout=arena.layout.name,
            requested_layout=arena.requested_layout.name,
            strategy=arena.layout.strategy,
            fell_back=arena.fell_back,
            start=placement.start,
            end=placement.end,
            arena_start=placement.arena_start,
            arena_used=placement.arena_used,
            touched=touch,
            before=before,
            after=after,
            ps_before=ps_before,
            ps_after=ps(os.getpid()),
            maps=arena.maps(),
        )

    def _rehearse(self) -> None:
        """Do it all once, so that the interpreter's own memory does not grow in between."""
        for _ in range(2):
            Snapshot.take()
            with Arena(self._size, layout=self._layout) as arena:
                arena.grow(MiB)
            ps(os.getpid())
        gc.collect()


def _refuse_too_much(touch: int) -> None:
    available = proc.available_bytes()
    if touch > available:
        msg = (
            f"touching {format_size(touch)} takes that much memory, and {format_size(available)} "
            "are available"
        )
        raise OutOfMemoryError(errno.ENOMEM, msg, verb="populate", nbytes=touch)


def _touch(arena: Arena, nbytes: int, progress: Progress) -> None:
    with progress(nbytes) as advance:
        for step in _steps(nbytes):
            block = arena.grow(step)
            arena.region.populate(block - arena.region.base, step)
            advance(step)


def _steps(nbytes: int) -> Iterator[int]:
    """Cut into the 1 MiB by which Go's heap grew, and the rest in whole pages."""
    yield from (MiB for _ in range(nbytes // MiB))
    rest = nbytes % MiB
    if rest:
        yield round_up(rest, max(GO_PAGE, PAGE_SIZE))


def ps(pid: int) -> tuple[int, int] | None:
    """Ask ``ps`` for VSZ and RSS of a process, in KiB; None where ps can't be run."""
    command = shutil.which("ps")
    if command is None:
        return None
    try:
        answer = subprocess.run(
            [command, "-o", "vsz=,rss=", "-p", str(pid)],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no process may be started: ps is a witness, not a need
        return None
    fields = answer.stdout.split()
    return (int(fields[0]), int(fields[1])) if len(fields) == 2 else None
