"""Closing by close() or the end of a with block: under views, and from inside other calls."""

import contextlib
import copy
import gc
import pickle
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

import pyreserve
from helpers import witness
from pyreserve import (
    PAGE_SIZE,
    Arena,
    Bitmap,
    BumpArena,
    FreeError,
    GiB,
    GrowableArray,
    GrowableBuffer,
    MiB,
    Pool,
    ReleasedError,
    ViewError,
    layouts,
)
from pyreserve.units import WORD


class Kind(NamedTuple):
    """How to create, view and use one kind of object that owns a region."""

    make: Callable[[], Any]
    view: Callable[[Any], Any]
    use: Callable[[Any], object]
    region: Callable[[Any], Any]


def _view_region(region: Any) -> memoryview:
    region.commit(0, 4 * PAGE_SIZE)
    return region.view(0, 16)  # type: ignore[no-any-return]


def _view_bitmap(bits: Any) -> memoryview:
    bits.set(0, 64)
    return bits.words(0, 64)  # type: ignore[no-any-return]


def _view_buffer(buffer: Any) -> memoryview:
    buffer.extend(b"abc")
    return buffer.view()  # type: ignore[no-any-return]


def _view_array(array: Any) -> Any:
    array.extend([1, 2])
    return array.array


def _inner(subject: Any) -> Any:
    return subject._region


KINDS = {
    "Region": Kind(
        lambda: pyreserve.reserve(MiB), _view_region, lambda r: r.commit(0, PAGE_SIZE), lambda r: r
    ),
    "BumpArena": Kind(lambda: BumpArena(GiB), lambda a: a.alloc(8), lambda a: a.alloc(8), _inner),
    "Pool": Kind(lambda: Pool(48), lambda p: p.view(p.alloc()), lambda p: p.alloc(), _inner),
    "Bitmap": Kind(lambda: Bitmap(1000), _view_bitmap, lambda b: b.set(1), _inner),
    "GrowableBuffer": Kind(
        lambda: GrowableBuffer(MiB), _view_buffer, lambda g: g.extend(b"x"), _inner
    ),
    "GrowableArray": Kind(
        lambda: GrowableArray("f8", 10**7), _view_array, lambda g: g.append(1), _inner
    ),
    **{
        f"Arena {name}": Kind(
            lambda name=name: Arena(GiB if name == "native" else None, layout=name),  # type: ignore[misc]
            lambda a: a.alloc(800).view(),
            lambda a: a.alloc(8),
            lambda a: a.region,
        )
        for name in ("native", "go-tip-2014-12/amd64", "go1.11/amd64", "go-tip-2014-12/386")
        if layouts.get(name).word <= WORD
    },
}

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def address(view: Any) -> int:
    start: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return start


class TestEveryKind:
    @kinds
    def test_the_end_of_a_with_block(self, kind: Kind) -> None:
        """The object is closed at once; views stay valid; the last one frees the addresses."""
        with kind.make() as subject:
            view = kind.view(subject)
            region = kind.region(subject)
            base, size = region.base, region.size
            if isinstance(subject, Arena) and subject.layout.arena_metadata:
                # The window contains foreign mappings too.
                [(base, end)] = subject.placement.arenas
                size = end - base

        assert subject.released
        assert region.released
        where = address(view)
        seen = witness.nbytes(base, size)
        assert subject.committed == region.committed == seen > 0
        assert region.reserved == seen + witness.nbytes(base, size, witness.RESERVED)
        view[0] = 1
        assert view[0] == 1
        del view
        assert not witness.is_mapped(where)
        with pytest.raises(ReleasedError):
            _ = subject.committed

    @kinds
    @pytest.mark.parametrize("viewed", [False, True])
    def test_an_exception_passes(self, kind: Kind, viewed: bool) -> None:
        """An exception in the block reaches the caller, without another one as its context."""
        held, subject = [], kind.make()

        def work() -> None:
            with subject:
                if viewed:
                    held.append(kind.view(subject))
                raise KeyError

        with pytest.raises(KeyError) as raised:
            work()

        assert raised.value.__context__ is None
        assert subject.released

    @kinds
    def test_closing(self, kind: Kind) -> None:
        """contextlib.closing works; closing again, or after a release, does nothing."""
        with contextlib.closing(kind.make()) as subject:
            view = kind.view(subject)
        assert subject.released
        subject.close()
        del view
        subject.close()

        other = kind.make()
        other.release()
        other.close()
        with pytest.raises(ReleasedError):
            other.release()

    @kinds
    @pytest.mark.parametrize("viewed", [False, True])
    def test_new_use_is_refused(self, kind: Kind, viewed: bool) -> None:
        """A closed object refuses the same calls as a released one."""
        subject = kind.make()
        view = kind.view(subject) if viewed else None
        subject.close()

        for use in (kind.use, kind.view, lambda t: t.release(), lambda t: t.__enter__()):
            with pytest.raises(ReleasedError):
                use(subject)
        assert "released" in repr(subject)
        for fails in (copy.copy, pickle.dumps):
            with pytest.raises((TypeError, ReleasedError)):
                fails(subject)
        del view

    @kinds
    def test_unused(self, kind: Kind) -> None:
        """Closing an unused object frees its addresses."""
        subject = kind.make()
        region = kind.region(subject)
        base, owned = region.base, region.reserved
        subject.close()

        assert subject.released
        if owned:  # a window owns no addresses at first
            assert not witness.is_mapped(base)

    @kinds
    def test_release_stays_strict(self, kind: Kind) -> None:
        """An explicit release under a live view is refused, and the error gives advice."""
        subject = kind.make()
        view = kind.view(subject)

        with pytest.raises(ViewError, match=r"delete the holder, or call close\(\)"):
            subject.release()

        assert not subject.released
        del view
        subject.release()

    @kinds
    def test_dropped_after_closing(self, kind: Kind) -> None:
        """A view outlives a closed, dropped object; no collection is needed afterwards."""
        gc.disable()
        try:
            subject = kind.make()
            view = kind.view(subject)
            where = address(view)
            subject.close()
            del subject
            view[0] = 1
            del view
            assert not witness.is_mapped(where)
        finally:
            gc.enable()

    @kinds
    def test_in_a_forked_child(self, kind: Kind) -> None:
        """A forked child has its own copy of a closed object and its view."""
        subject = kind.make()
        view = kind.view(subject)
        subject.close()
        where = address(view)
        held = [view]
        del view

        def child() -> tuple[bool, bool]:
            held[0][0] = 7
            held.clear()
            return subject.released, witness.is_mapped(where)

        assert witness.in_child(child) == (True, False)
        assert held[0][0] != 7
        assert witness.is_mapped(where)

    @kinds
    def test_another_thread_drops_the_last_view(self, kind: Kind) -> None:
        """The addresses are freed by whichever thread drops the last view."""
        subject = kind.make()
        views = [kind.view(subject)]
        where = address(views[0])
        subject.close()
        thread = threading.Thread(target=views.clear)
        thread.start()
        thread.join()

        assert not witness.is_mapped(where)

    @kinds
    def test_a_handler_that_closes(self, kind: Kind) -> None:
        """A signal handler may close the object whose call it interrupts, at any moment."""

        def child() -> int:
            closed = 0

            def handler(*_: object) -> None:
                nonlocal closed
                subjects[-1].close()
                closed += 1

            subjects: list[Any] = []
            held: list[Any] = []
            signal.signal(signal.SIGALRM, handler)
            for i in range(200):
                subjects.append(kind.make())
                with contextlib.suppress(ReleasedError, pyreserve.RangeError):
                    signal.setitimer(signal.ITIMER_REAL, 2e-6 * (i + 1))
                    for _ in range(50):
                        held.append(kind.view(subjects[-1]))
                    while closed <= i:
                        kind.use(subjects[-1])
                while closed <= i:
                    pass
                while held:
                    held.pop()[0] = 1
                assert subjects[-1].released
                with pytest.raises(ReleasedError):
                    _ = subjects[-1].committed
            return closed

        assert witness.in_child(child) == 200


class TestRegion:
    def test_sealed(self) -> None:
        """A sealed region can be closed, but keeps its addresses until the process ends."""
        if not pyreserve.capabilities().mseal:
            pytest.skip("this kernel has no mseal")
        with pyreserve.reserve(PAGE_SIZE, seal=True) as region:
            base = region.base
            view = region.view(0, 4)

        assert region.released
        view[0] = 1
        del view
        assert witness.is_mapped(base)

    def test_part_of_an_arena(self) -> None:
        """Only the arena can close its region."""
        with Arena(MiB) as arena:
            with pytest.raises(pyreserve.StateError, match="part of an arena"):
                arena.region.close()
            with pytest.raises(pyreserve.StateError, match="part of an arena"), arena.region:
                pass
            assert not arena.released

    def test_many_views(self) -> None:
        """Only the last of many views frees the addresses, in any order of deletion."""
        with pyreserve.reserve(MiB) as region:
            region.commit(0, MiB)
            base = region.base
            views = [region.view(i * 100, 50) for i in range(1000)]
        arrays = [np.frombuffer(view, np.uint8)[3:] for view in views[::7]]

        views.reverse()
        del views[1:]
        views.clear()
        assert witness.is_mapped(base)
        del arrays[1:]
        arrays[0][:] = 1
        assert witness.is_mapped(base)
        arrays.clear()
        assert not witness.is_mapped(base)

    def test_its_storage_is_not_shared(self) -> None:
        """A new region does not share the handle of a region that was closed under a view."""
        held = []
        for _ in range(100):
            with pyreserve.reserve(PAGE_SIZE) as region:
                region.commit(0, PAGE_SIZE)
                held.append(region.view(0, 8))
            held[-1][:] = len(held).to_bytes(8, "little")
            del region
        fresh = pyreserve.reserve(PAGE_SIZE)
        fresh.commit(0, PAGE_SIZE)
        assert [int.from_bytes(view, "little") for view in held] == list(range(1, 101))
        held.clear()
        fresh.view(0, 1)[0] = 1


class TestFinalisers:
    def test_called_by_hand(self) -> None:
        """A direct call of __del__, even twice, ends its own region and no other."""
        dead = [pyreserve.reserve(MiB) for _ in range(3)]
        for region in dead:
            region.commit(0, MiB)
            region.__del__()
            region.__del__()
        fresh = [pyreserve.reserve(MiB) for _ in range(3)]
        for region in fresh:
            region.commit(0, MiB)

        for region in dead:
            assert region.released
            for use in (
                lambda region=region: region.decommit(0, MiB),
                lambda region=region: region.view(0, 1),
                region.release,
            ):
                with pytest.raises(ReleasedError):
                    use()
            region.close()
            region.__del__()

        assert [region.committed for region in fresh] == [MiB] * 3
        assert len({region.base for region in fresh}) == 3

    def test_called_by_hand_on_an_arenas_region(self) -> None:
        """The blocks of an arena stay usable after a direct call of __del__ of its region."""
        arena = Arena(16 * MiB)
        block = arena.alloc(8)
        arena.region.__del__()

        block.view()[:] = b"12345678"
        assert arena.alloc(MiB).nbytes == MiB
        arena.release()

    def test_called_by_hand_before_the_first_block(self) -> None:
        """An arena without blocks whose region was ended by __del__ is released."""
        arena = Arena(16 * MiB)
        arena.region.__del__()

        assert arena.released
        with pytest.raises(ReleasedError):
            arena.alloc(8)


@pytest.fixture
def arena() -> Iterator[Arena]:
    """A native arena, closed at the end."""
    with Arena(GiB) as opened:
        yield opened


class TestBlock:
    def test_freed_with_the_last_view(self, arena: Arena) -> None:
        """A block closed under views is unusable at once, and is freed with the last view."""
        with arena.alloc(MiB) as block:
            views = [block.view(), block.view()[5:10]]
            offset = block.offset

        assert block.freed
        assert arena.block_at(arena.region.base + offset) is None
        assert list(arena.blocks()) == []
        assert arena.memstats().heap_inuse == MiB
        for use in (block.free, block.view, lambda: arena.free_many([block])):
            with pytest.raises(FreeError):
                use()
        assert arena.alloc(MiB).offset > offset
        views.pop()
        assert arena.in_use == 2 * MiB
        views.pop()
        assert arena.in_use == MiB
        assert arena.alloc(MiB).offset == offset

    def test_without_views(self, arena: Arena) -> None:
        """A block without views is freed at once, also when an exception ends the with block."""
        with arena.alloc(8) as block:
            pass
        assert block.freed
        with pytest.raises(KeyError), arena.alloc(8):
            raise KeyError
        assert arena.in_use == 0
        block.close()
        assert arena.in_use == 0

    def test_freed_inside(self, arena: Arena) -> None:
        """A block freed inside the with block is not freed twice; a block in its place stays."""
        with arena.alloc(8) as block:
            block.free()
            other = arena.alloc(8)
        assert not other.freed
        other.free()

    def test_an_array_of_each_block(self, arena: Arena) -> None:
        """An array keeps its own closed block in use, and no other block."""
        arrays = []
        for i in range(50):
            with arena.alloc(PAGE_SIZE) as block:
                arrays.append(np.frombuffer(block.view(), np.uint8))
                arrays[-1][:] = i
        assert arena.in_use == 50 * max(arena.layout.page, PAGE_SIZE)
        assert [int(array[-1]) for array in arrays] == list(range(50))
        del arrays[::2]
        assert arena.in_use == 25 * max(arena.layout.page, PAGE_SIZE)
        arrays.clear()
        assert arena.in_use == 0

    def test_a_view_of_the_region_counts(self, arena: Arena) -> None:
        """Views made from the arena's region keep a closed block in use, too."""
        with arena.alloc(8) as block:
            view = block.view()
            offset = block.offset
            other = arena.region.view(offset, 8)
        late = arena.region.view(offset, 8)
        del view, other
        assert arena.alloc(8).offset != offset
        del late
        assert arena.alloc(8).offset == offset

    def test_a_busy_arena_frees_at_its_next_call(self, arena: Arena) -> None:
        """A view that dies while another thread holds the lock does not wait for it."""
        with arena.alloc(8) as block:
            views = [block.view()]
            offset = block.offset
        inside, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with arena._lock:
                inside.set()
                leave.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        inside.wait()
        views.clear()
        leave.set()
        thread.join()

        assert arena.alloc(8).offset == offset

    def test_the_arena_ends_first(self) -> None:
        """Views of blocks stay valid after their arena is closed or dropped."""
        for end in (lambda a: a.close(), lambda a: None):
            arena = Arena(16 * MiB)
            with arena.alloc(8) as block:
                view = block.view()
            where = address(view)
            end(arena)
            del arena, block
            view[:] = b"12345678"
            del view
            gc.collect()
            assert not witness.is_mapped(where)

    def test_many_threads(self) -> None:
        """No block stays in use if threads close blocks while others drop the views."""
        arena = Arena(GiB)
        pile: list[memoryview] = []
        errors: list[BaseException] = []
        stop = threading.Event()

        def close() -> None:
            try:
                for i in range(2000):
                    with arena.alloc(64 + i % 5 * 8192) as block:
                        block.view()[0] = i & 255
                        pile.append(block.view())
            except BaseException as error:  # noqa: BLE001, RUF100
                errors.append(error)

        def drop() -> None:
            while not stop.is_set() or pile:
                with contextlib.suppress(IndexError):
                    pile.pop()

        closers = [threading.Thread(target=close) for _ in range(3)]
        droppers = [threading.Thread(target=drop) for _ in range(2)]
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            for thread in closers + droppers:
                thread.start()
            for thread in closers:
                thread.join()
            stop.set()
            for thread in droppers:
                thread.join()
        finally:
            stop.set()
            sys.setswitchinterval(before)

        assert errors == []
        assert arena.in_use == 0
        assert arena._heap._closed_blocks == {}
        arena.release()


class TestMessages:
    def test_it_names_the_array(self) -> None:
        """The text of a ViewError names the type and address range of the holder."""
        region = pyreserve.reserve(MiB)
        region.commit(0, MiB)
        held = [np.frombuffer(region.view(16, 32), np.uint8)]

        with pytest.raises(ViewError) as refused:
            region.release()

        text = str(refused.value)
        assert "[0x10, 0x30)" in text
        low = region.base + 16
        assert text.endswith(f"(held by ndarray over {low:#x}-{low + 32:#x})")
        held.clear()
        assert "held by" not in str(refused.value)
        region.release()

    def test_it_names_the_memoryview(self) -> None:
        """A memoryview without an array is named as a memoryview."""
        region = pyreserve.reserve(MiB)
        region.commit(0, MiB)
        held = [region.view(0, 32)]

        with pytest.raises(ViewError) as refused:
            region.decommit(0, MiB)

        low = region.base
        assert f"held by memoryview over {low:#x}-{low + 32:#x}" in str(refused.value)
        held.clear()
        region.release()

    def test_it_keeps_nothing_alive(self) -> None:
        """Neither the error nor its text keeps a view alive, and the error can be pickled."""
        region = pyreserve.reserve(MiB)
        region.commit(0, MiB)
        view = region.view(0, 32)
        with pytest.raises(ViewError) as refused:
            region.release()
        text = str(refused.value)
        again = pickle.loads(pickle.dumps(refused.value))

        assert isinstance(again, ViewError)
        assert str(again) == text
        del view
        region.release()

    def test_a_blocks(self, arena: Arena) -> None:
        """The error for a block under a view advises the block's close()."""
        block = arena.alloc(8)
        view = block.view()
        with pytest.raises(ViewError, match=r"or call the block's close\(\)"):
            block.free()
        del view
        block.free()

    def test_odd_objects(self) -> None:
        """The search for holders copes with unusual objects and runs none of their code."""

        class Lazy:
            def _lie(self) -> type:
                raise AssertionError

            locals()["__class__"] = property(_lie)

        class Loop(np.ndarray):
            @property
            def base(self) -> Any:
                return self

        class Gone:
            pass

        region = pyreserve.reserve(MiB)
        region.commit(0, MiB)
        gone = Gone()
        odd = [Lazy(), weakref.proxy(gone), region.ndarray(0, 4).view(Loop), memoryview(b"")]
        odd[-1].release()
        del gone

        with pytest.raises(ViewError) as refused:
            region.release()

        assert "held by Loop" in str(refused.value)
        odd.clear()
        region.release()


class TestSignals:
    """A signal handler that raises at any moment loses nothing and leaves no lock held."""

    def struck(self, script: str) -> Any:
        return witness.fresh_python(
            f"""
import gc, json, random, signal, threading
from helpers import witness
from pyreserve import *
class Struck(Exception): pass
struck = False
def handler(*_):
    global struck
    struck = True
    raise Struck
signal.signal(signal.SIGALRM, handler)
def repeat(act):
    global struck
    struck = False
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 2e-4))
    while not struck: act()
def strike(act):  # CPython does not cover each jump of a loop by a try around it
    try: repeat(act)
    except Struck: pass
def is_free(lock):
    answer = []
    def attempt():
        answer.append(lock.acquire(timeout=5))
        if answer[0]: lock.release()
    thread = threading.Thread(target=attempt)
    thread.start(); thread.join()
    return answer[0]
{script}
"""
        )

    def test_blocks(self) -> None:
        """All blocks closed under views are freed in the end, and the lock is free."""
        in_use, left, is_free = self.struck(
            """
arena = Arena(GiB)
def act():
    with arena.alloc(100) as block: view = block.view()
    arena.trim()
import sys
sys.unraisablehook = lambda *_: None
for _ in range(1500): strike(act)
signal.signal(signal.SIGALRM, signal.SIG_IGN)
gc.collect()
for block in list(arena.blocks()): block.free()  # struck before the block was closed
print(json.dumps([arena.in_use, len(arena._heap._closed_blocks), is_free(arena._lock)]))
"""
        )

        assert (in_use, left) == (0, 0)
        # From 3.14 on CPython may run a handler between the __enter__ of a lock and the body.
        assert is_free or sys.version_info >= (3, 14)

    def test_regions(self) -> None:
        """Regions closed under views leave no addresses mapped."""
        mapped = self.struck(
            """
import sys
sys.unraisablehook = lambda *_: None
from pyreserve._system import proc
from pyreserve._region.exports import sweep_outliving as _sweep_outliving
view = None
def act():
    global view
    with reserve(64 * MiB) as region:
        region.commit(0, 4096)
        view = region.view(0, 1)
    view = None
before = proc.status_kib()["VmSize"]
for _ in range(1500): strike(act)
signal.signal(signal.SIGALRM, signal.SIG_IGN)
view = None
gc.collect()
_sweep_outliving()
print(json.dumps((proc.status_kib()["VmSize"] - before) // 1024))
"""
        )

        assert mapped < 10 * 64
