"""Compare two explanations, as ``pyreserve explain --json`` writes them."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from pyreserve._system.report import Report, Table
from pyreserve.procmem.show.explained import CLASS_LABELS
from pyreserve.procmem.space import SCHEMA, AddressSpace
from pyreserve.units import KiB, format_size

if TYPE_CHECKING:
    from pathlib import Path

_TOTALS = ("vsz", "rss", "pss", "uss", "swap", "page_tables", "mappings")
_REQUIRED = {"vsz", "mappings"}


def _key(name: str) -> str:
    """Return the JSON key of a total."""
    return name if name == "mappings" else f"{name}_kib"


def _unit(name: str) -> int:
    """Return the unit of a total in JSON."""
    return 1 if name == "mappings" else KiB


def _totals(data: dict[str, Any]) -> dict[str, int]:
    """Return the known totals, sizes in bytes."""
    totals = {name: data[_key(name)] for name in _TOTALS}
    return {name: total * _unit(name) for name, total in totals.items() if total is not None}


class Change(NamedTuple):
    """One figure before and after, in bytes; the total ``mappings`` is a number."""

    name: str
    old: int
    new: int

    @property
    def by(self) -> int:
        """The growth; negative if the figure shrank."""
        return self.new - self.old


class Difference(NamedTuple):
    """The result of `compare`. Unchanged owners and classes are omitted; largest change first.

    ``str()`` gives the verdict and tables of the changes, in a notebook as HTML.
    """

    same_process: bool
    totals: tuple[Change, ...]
    classes: tuple[Change, ...]
    owners: tuple[Change, ...]
    owners_resident: tuple[Change, ...]

    @property
    def verdict(self) -> str:
        """A summary of the largest changes, in one or two sentences."""
        by = {change.name: change.by for change in self.totals}
        text = f"VSZ {_change_text(by['vsz'])}, memory (RSS) {_change_text(by.get('rss'))}."
        for resource, changes in (("addresses", self.owners), ("memory", self.owners_resident)):
            grew = next((change for change in changes if change.by > 0), None)
            if grew is not None:
                text += f" Most {resource} went to {grew.name}: {format_size(grew.by)}."
        return text

    def __str__(self) -> str:
        return self._report().text()

    def _repr_html_(self) -> str:
        return self._report().html()

    def _report(self) -> Report:
        return Report(
            self.verdict,
            () if self.same_process else ("These are two different processes.",),
            tuple(changes_tables(self)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as ``pyreserve explain --diff A B --json`` writes it."""
        return {
            "schema": SCHEMA,
            "same_process": self.same_process,
            "totals": [
                _to_dict(change, _key(change.name), _unit(change.name)) for change in self.totals
            ],
            "classes": [_to_dict(change, change.name) for change in self.classes],
            "owners": [_to_dict(change, change.name) for change in self.owners],
            "owners_resident": [_to_dict(change, change.name) for change in self.owners_resident],
            "verdict": self.verdict,
        }


def changes_tables(difference: Difference) -> Iterator[Table]:
    """Yield a table for each kind of figures that changed."""
    for title, changes in (
        ("totals", [change for change in difference.totals if change.by]),
        ("by class", difference.classes),
        ("addresses by owner", difference.owners),
        ("memory by owner", difference.owners_resident),
    ):
        if changes:
            yield Table((title, "before", "after", "change"), list(map(_row, changes)))


def load(path: "str | Path") -> dict[str, Any]:
    """Read a file that ``pyreserve explain --json`` wrote.

    Raises:
        OSError: the file can't be read.
        ValueError: the file is not JSON, or ``pyreserve explain --json`` did not write it.
    """
    import json  # noqa: PLC0415

    try:
        with open(os.fspath(path), encoding="utf-8") as file:
            data = json.load(file)
    except (ValueError, RecursionError) as error:
        msg = f"{path} is not JSON: {error}"
        raise ValueError(msg) from None
    try:
        _check(data)
    except (KeyError, TypeError, AttributeError):
        msg = f"{path} was not written by pyreserve explain --json"
        raise ValueError(msg) from None
    loaded: dict[str, Any] = data
    return loaded


def _check(data: Any) -> None:
    """Raise KeyError, TypeError or AttributeError unless the fields of `compare` are valid."""
    if data["schema"] != SCHEMA:
        raise KeyError
    totals = {name: data[_key(name)] for name in _TOTALS}
    numbers = [total for name, total in totals.items() if name in _REQUIRED or total is not None]
    for entry in (*data["classes"], *data["owners"]):
        numbers += [entry["kib"], entry.get("rss_kib") or 0]
        entry["name"].strip()
    if not all(type(number) is int for number in numbers):
        raise TypeError


def compare(old: AddressSpace | dict[str, Any], new: AddressSpace | dict[str, Any]) -> Difference:
    """Compare two explanations, or what `AddressSpace.to_dict` or `load` returned.

    Totals that one of them does not know are omitted.
    """
    old, new = (data.to_dict() if isinstance(data, AddressSpace) else data for data in (old, new))
    before, after = _totals(old), _totals(new)
    return Difference(
        same_process=(old.get("pid"), old.get("name")) == (new.get("pid"), new.get("name")),
        totals=tuple(
            Change(name, before[name], after[name])
            for name in _TOTALS
            if name in before and name in after
        ),
        classes=_changes(old["classes"], new["classes"], "kib"),
        owners=_changes(old["owners"], new["owners"], "kib"),
        owners_resident=(
            ()
            if old["uss_kib"] is None or new["uss_kib"] is None
            else _changes(old["owners"], new["owners"], "rss_kib")
        ),
    )


def _changes(old: list[dict[str, Any]], new: list[dict[str, Any]], key: str) -> tuple[Change, ...]:
    before = {entry["name"]: entry[key] * KiB for entry in old}
    after = {entry["name"]: entry[key] * KiB for entry in new}
    changes = [
        Change(name, before.get(name, 0), after.get(name, 0)) for name in {**before, **after}
    ]
    return tuple(
        sorted(
            (change for change in changes if change.by),
            key=lambda change: (-abs(change.by), change.name),
        )
    )


def _change_text(growth: int | None) -> str:
    if growth is None:
        return "can't be compared"
    if not growth:
        return "did not change"
    return f"{'grew' if growth > 0 else 'shrank'} by {format_size(abs(growth))}"


def _row(change: Change) -> tuple[str, ...]:
    form = "{:,}".format if change.name == "mappings" else format_size
    name = "page tables" if change.name == "page_tables" else change.name
    sign = "+" if change.by > 0 else ""
    return (
        CLASS_LABELS.get(name, name),
        form(change.old),
        form(change.new),
        f"{sign}{form(change.by)}",
    )


def _to_dict(change: Change, key: str, unit: int = KiB) -> dict[str, Any]:
    old, new, growth = (figure // unit for figure in (change.old, change.new, change.by))
    return {"name": key, "old": old, "new": new, "change": growth}
