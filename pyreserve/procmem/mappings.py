"""The mappings of an explained process, each with its class and its owners."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pyreserve._system.maps import MapTable, perms_text
from pyreserve.procmem.judge import classes
from pyreserve.procmem.judge.owners import Claims, Part
from pyreserve.units import KiB


class Mapping(NamedTuple):
    """One mapping. Addresses and sizes in bytes.

    Attributes:
        start, end: addresses [start, end).
        perms: as in /proc/PID/maps, such as ``"rw-p"``.
        name: path of a file, or the name given by kernel or program; may be empty.
        size: size.
        private, shared: resident size of this process alone, and shared with others, pages of huge
            page pools included; 0 if not known.
        swap: size in swap; 0 if not known.
        class_name: class of the bytes outside memory; see `pyreserve.procmem.judge.classes`. Empty
            for ``[vsyscall]``, which is in no class.
        owner: owner of the mapping, or of its largest part.
        parts: the parts of the mapping by owner, in address order.
    """

    start: int
    end: int
    perms: str
    name: str
    size: int
    private: int
    shared: int
    swap: int
    class_name: str
    owner: str
    parts: tuple[Part, ...]

    @property
    def rss(self) -> int:
        """Resident size, pages of huge page pools included; 0 if not known."""
        return self.private + self.shared


class Mappings:
    """All mappings of a process in address order, built from the table's columns when read."""

    def __init__(
        self,
        table: MapTable,
        claims: Claims,
        rest_classes: Sequence[int | None],
        *,
        knows_memory: bool,
    ) -> None:
        self._table, self._claims, self._rest_classes = table, claims, rest_classes
        self._class_names = dict(enumerate(classes.NAMES))
        if not knows_memory:
            self._class_names |= dict.fromkeys(
                (classes.UNTOUCHED, classes.FILE), classes.ACCESSIBLE
            )

    def __len__(self) -> int:
        return len(self._rest_classes)

    def __iter__(self) -> Iterator[Mapping]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, i: int) -> Mapping:
        table, rest_class = self._table, self._rest_classes[i]
        start, end = table.start[i], table.end[i]
        kernel = rest_class is None
        return Mapping(
            start=start,
            end=end,
            perms=perms_text(table.perms[i]),
            name=table.names[i],
            size=end - start,
            private=table.private[i] * KiB,
            shared=table.shared[i] * KiB,
            swap=table.swap[i] * KiB,
            class_name="" if rest_class is None else self._class_names[rest_class],
            owner="kernel" if kernel else self._claims.owner_of(i),
            parts=(Part(start, end, "kernel"),) if kernel else self._claims.parts_of(i),
        )

    def largest(self, n: int) -> list[Mapping]:
        """List the `n` largest mappings in user space, largest first."""
        size = self._table.size
        order = sorted(range(self._table.user_mappings), key=lambda i: (-size[i], i))
        return [self[i] for i in order[: max(0, n)]]
