"""Compare two explanations, as ``pyreserve explain --json`` writes them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyreserve.procmem.space import SCHEMA
from pyreserve.units import KiB, format_size

_OPTIONAL = {"rss_kib", "pss_kib", "uss_kib", "swap_kib", "page_tables_kib"}
_TOTALS = ("vsz_kib", "rss_kib", "pss_kib", "uss_kib", "swap_kib", "page_tables_kib", "mappings")


@dataclass(frozen=True, slots=True)
class Change:
    """One figure before and after, in KiB; the total ``mappings`` is a number."""

    name: str
    old: int
    new: int

    @property
    def by(self) -> int:
        """The growth; negative if the figure shrank."""
        return self.new - self.old


@dataclass(frozen=True, slots=True)
class Difference:
    """The result of `compare`. Unchanged owners and classes are omitted; largest change first."""

    same_process: bool
    totals: tuple[Change, ...]
    classes: tuple[Change, ...]
    owners: tuple[Change, ...]
    owners_resident: tuple[Change, ...]

    @property
    def verdict(self) -> str:
        """A summary of the largest changes, in one or two sentences."""
        by = {change.name: change.by for change in self.totals}
        text = f"VSZ {_change_text(by['vsz_kib'])}, memory (RSS) {_change_text(by.get('rss_kib'))}."
        for resource, changes in (("addresses", self.owners), ("memory", self.owners_resident)):
            grew = next((change for change in changes if change.by > 0), None)
            if grew is not None:
                text += f" Most {resource} went to {grew.name}: {format_size(grew.by * KiB)}."
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as ``pyreserve explain --diff A B --json`` writes it."""
        return {
            "schema": SCHEMA,
            "same_process": self.same_process,
            "totals": _to_dicts(self.totals),
            "classes": _to_dicts(self.classes),
            "owners": _to_dicts(self.owners),
            "owners_resident": _to_dicts(self.owners_resident),
            "verdict": self.verdict,
        }


def load(path: Path) -> dict[str, Any]:
    """Read a file that ``pyreserve explain --json`` wrote.

    Raises:
        OSError: the file can't be read.
        ValueError: the file is not JSON, or ``pyreserve explain --json`` did not write it.
    """
    import json  # noqa: PLC0415

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
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
    numbers = [data[name] for name in _TOTALS if name not in _OPTIONAL or data[name] is not None]
    for entry in (*data["classes"], *data["owners"]):
        numbers += [entry["kib"], entry.get("rss_kib") or 0]
        entry["name"].strip()
    if not all(type(number) is int for number in numbers):
        raise TypeError


def compare(old: dict[str, Any], new: dict[str, Any]) -> Difference:
    """Compare two explanations, as `AddressSpace.to_dict` or `load` returns them.

    Totals that one of them does not know are omitted.
    """
    return Difference(
        same_process=(old.get("pid"), old.get("name")) == (new.get("pid"), new.get("name")),
        totals=tuple(
            Change(name, old[name], new[name])
            for name in _TOTALS
            if old[name] is not None and new[name] is not None
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
    before = {entry["name"]: entry[key] for entry in old}
    after = {entry["name"]: entry[key] for entry in new}
    changes = [
        Change(name, before.get(name, 0), after.get(name, 0)) for name in {**before, **after}
    ]
    return tuple(
        sorted(
            (change for change in changes if change.by),
            key=lambda change: (-abs(change.by), change.name),
        )
    )


def _change_text(kib: int | None) -> str:
    if kib is None:
        return "can't be compared"
    if not kib:
        return "is as it was"
    return f"{'grew' if kib > 0 else 'shrank'} by {format_size(abs(kib) * KiB)}"


def _to_dicts(changes: tuple[Change, ...]) -> list[dict[str, Any]]:
    return [
        {"name": change.name, "old": change.old, "new": change.new, "change": change.by}
        for change in changes
    ]
