"""The error for bytes that live views show, and the search for the objects that hold the views."""

import gc
import sys
from operator import itemgetter
from typing import Any

from pyreserve._region.handles import Buffer, address_of
from pyreserve._region.viewtable import Entry
from pyreserve.errors import ViewError

_NAMED = 3  # views listed in a message
_BATCH = 10_000  # objects examined at a time
_LONGEST_CHAIN = 100  # maximum number of nested arrays and memoryviews
_ADVICE = {
    "release": "delete the holder, or call close(), which defers the release to the last view",
    "free": "delete the holder, or call the block's close(), which frees it with the last view",
}


def view_error(prefix: str, held: list[Entry], verb: str = "") -> ViewError:
    """Return the ViewError for `verb`; the message starts with `prefix`."""
    held = sorted(held, key=itemgetter(1, 2))
    ranges = ", ".join(f"[{lo:#x}, {hi:#x})" for _, lo, hi in held[:_NAMED])
    more = ", ..." if len(held) > _NAMED else ""
    views = "1 live view holds" if len(held) == 1 else f"{len(held)} live views hold"
    advice = _ADVICE.get(verb, "delete the holder first")
    text = f"{prefix}: {views} bytes of it: {ranges}{more}; {advice}"
    return ViewError(text, _Holders(held[:_NAMED]))


class _Holders:
    """Finds and describes the holders of views only when called: scanning all objects is slow."""

    def __init__(self, entries: list[Entry]) -> None:
        self._entries = entries

    def __call__(self) -> list[str]:
        alive = {
            id(anchor): (address_of(anchor), hi - lo)
            for ref, lo, hi in self._entries
            if (anchor := ref()) is not None
        }
        types: dict[int, set[str]] = {}
        for holder in _find_holders() if alive else ():
            types.setdefault(id(_anchor_behind(holder)), set()).add(type(holder).__name__)
        return [
            f"{' and '.join(sorted(types[key]))} over {address:#x}-{address + nbytes:#x}"
            for key, (address, nbytes) in alive.items()
            if key in types
        ]


def _find_holders() -> list[Any]:
    """Return the memoryviews and ndarrays that variables, containers and attributes refer to.

    A buffer without such a holder is represented by a memoryview that the garbage collector tracks.
    Examines every tracked object.
    """
    numpy = sys.modules.get("numpy")
    kinds = (memoryview,) if numpy is None else (memoryview, numpy.ndarray)
    holders: list[Any] = []
    memoryviews = []
    objects = gc.get_objects()
    for start in range(0, len(objects), _BATCH):
        batch = objects[start : start + _BATCH]
        holders += [obj for obj in gc.get_referents(*batch) if issubclass(type(obj), kinds)]
        memoryviews += [obj for obj in batch if type(obj) is memoryview]
    holders += [obj for obj in _variables() if issubclass(type(obj), kinds)]
    seen = {id(_anchor_behind(holder)) for holder in holders}
    return holders + [view for view in memoryviews if id(_anchor_behind(view)) not in seen]


def _variables() -> list[Any]:
    """Return the values of the local variables of running functions; none before Python 3.13.

    Before 3.13, reading f_locals keeps the values alive.
    """
    values: list[Any] = []
    frames = list(sys._current_frames().values()) if sys.version_info >= (3, 13) else []
    try:
        while frames:
            frame = frames.pop()
            if frame.f_globals is not globals():
                values += frame.f_locals.values()
            frames += [] if frame.f_back is None else [frame.f_back]
        return values
    finally:
        frame = values = frames = None  # type: ignore[assignment]  # this frame is in `frames`


def _anchor_behind(holder: Any) -> Any:
    """Return the anchor of the buffer behind a memoryview or ndarray; None for other objects.

    Runs no code of the objects.
    """
    numpy = sys.modules.get("numpy")
    for _ in range(_LONGEST_CHAIN):
        if type(holder) is Buffer:
            return next(iter(gc.get_referents(holder)), None)
        if type(holder) is memoryview:
            try:
                holder = holder.obj
            except ValueError:  # a released memoryview
                return None
        elif numpy is not None and issubclass(type(holder), numpy.ndarray):
            holder = numpy.ndarray.base.__get__(holder)
        else:
            return None
    return None
