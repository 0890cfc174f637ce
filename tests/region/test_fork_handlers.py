"""Forks under signal handlers, other modules' at-fork handlers and threads."""

import os
import signal
import threading
from typing import Any

import pytest

import pyreserve
from helpers import witness
from pyreserve import PAGE_SIZE

PRELUDE = """
import faulthandler, json, os, signal, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on: threads and a fork
faulthandler.dump_traceback_later(60, exit=True)
"""


# Holds a lock that a fork must wait for, until `leave` is set.
BUSY = """
from pyreserve import *
region = reserve(MiB); region.commit(0, 4096)
busy, leave = threading.Event(), threading.Event()
def hold():
    with region.exports.lock:
        busy.set(); leave.wait()
thread = threading.Thread(target=hold); thread.start(); busy.wait()
"""


def run(script: str) -> Any:
    """Run a script in a fresh interpreter: at-fork handlers cannot be unregistered."""
    return witness.fresh_python(PRELUDE + script)


HOOKED = """
box = []
os.register_at_fork(WHERE=lambda: [use() for use in box])
from pyreserve import *
from pyreserve import PAGE_SIZE
arena, pool, pages = Arena(GiB), Pool(48), PageAllocator(1000)
region, bits, bump = reserve(MiB), Bitmap(1000), BumpArena(MiB)
arena.alloc(8), pool.alloc(), pages.alloc()
uses = [
    lambda: arena.alloc(100).free(),
    lambda: arena.alloc_many([8, 8]).free(),
    lambda: Arena(MiB).alloc(8),
    lambda: pool.free(pool.alloc()),
    lambda: pages.free(pages.alloc(3), 3),
    lambda: PageAllocator(10).alloc(),
    lambda: region.commit(0, PAGE_SIZE) or region.decommit(0, PAGE_SIZE),
    lambda: reserve(MiB).commit(0, PAGE_SIZE),
    lambda: bits.set(5),
    lambda: bump.alloc(8),
    lambda: arena.memstats(),
]
done = []
def note(use):
    try: use()
    except BaseException as error: done.append(repr(error))
    else: done.append("done")
box += [lambda use=use: note(use) for use in uses]
pid = os.fork()
if pid == 0:
    box.clear()
    arena.alloc(8); pool.alloc(); pages.alloc(); region.commit(0, MiB)
    other = os.fork()
    if other == 0: os._exit(0)
    good = os.waitpid(other, 0)[1] == 0
    if "child" in "WHERE": good = good and done == ["done"] * len(uses)
    os._exit(0 if good else 3)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
box.clear()
thread = threading.Thread(target=lambda: (arena.alloc(8), pool.alloc(), region.commit(0, MiB)))
thread.start(); thread.join()
print(json.dumps([status, done, len(uses)]))
"""


@pytest.mark.parametrize("where", ["before", "after_in_parent", "after_in_child"])
def test_handlers_registered_earlier(where: str) -> None:
    """At-fork handlers registered before the import of pyreserve may call pyreserve."""
    status, done, uses = run(HOOKED.replace("WHERE", where))

    assert status == 0
    assert done == ([] if where == "after_in_child" else ["done"] * uses)


@pytest.mark.parametrize("where", ["before", "after_in_parent", "after_in_child"])
def test_handlers_that_fork(where: str) -> None:
    """If an at-fork handler forks again, that child and its own child may call pyreserve."""
    result = run(
        f"""
        import textwrap
        depth = 0
        statuses = []
        def again():
            global depth
            if depth: return
            depth += 1
            pid = os.fork()
            if pid == 0:
                work()
                os._exit(0)
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            depth -= 1
        os.register_at_fork({where}=again)
        from pyreserve import *
        arena, pool, region = Arena(GiB), Pool(48), reserve(MiB)
        def work(): arena.alloc(8), pool.alloc(), region.commit(0, MiB)
        def use():
            work()
            thread = threading.Thread(target=work)
            thread.start(); thread.join()
        use()
        pid = os.fork()
        if pid == 0:
            use()
            os._exit(0 if statuses == [0] * ("parent" not in "{where}") else 9)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        use()
        print(json.dumps(statuses))
        """.replace("\n        ", "\n")
    )

    assert result == ([0] if where == "after_in_child" else [0, 0])


def test_a_handler_that_raises_while_a_fork_waits() -> None:
    """Exceptions of signal handlers while a fork waits for a lock are raised later, in order.

    The fork is safe all the same: the child can use the region and the arena.
    """
    result = run(
        BUSY
        + """
class Struck(BaseException): pass
arena = Arena(GiB); arena.alloc(8)
struck, parent = [], os.getpid()
def handler(*_):
    struck.append(len(struck))
    if len(struck) == 3:
        signal.setitimer(signal.ITIMER_REAL, 0)
        leave.set()
    raise Struck(struck[-1])
signal.signal(signal.SIGALRM, handler)
read_end, write_end = os.pipe()
caught = []
def fork():
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    if os.fork() == 0:
        region.commit(0, MiB); arena.alloc(8)
        os.write(write_end, b"child is fine")
        os._exit(0)
def rest():
    for _ in range(1000): time.sleep(0)
try:
    try:
        try: fork()
        finally: rest()
    finally: rest()
except Struck as error:
    while error is not None:
        caught.insert(0, error.args[0])
        error = error.__context__
thread.join()
status = os.waitstatus_to_exitcode(os.wait()[1])
region.commit(0, MiB); arena.alloc(8)
print(json.dumps([caught, status, os.read(read_end, 100).decode()]))
"""
    )

    assert result == [[0, 1, 2], 0, "child is fine"]


def test_its_exception_is_not_lost_in_a_later_handler() -> None:
    """The deferred exception is raised even if later modules registered at-fork handlers."""
    result = run(
        BUSY
        + """
seen = []
def slow():
    for _ in range(1000): seen.append(len(seen))
os.register_at_fork(after_in_parent=slow)
def handler(*_):
    leave.set()
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.05)
outcome = "lost"
try:
    if os.fork() == 0: os._exit(0)
except KeyboardInterrupt as error:
    outcome = [error.__traceback__.tb_frame.f_code.co_name, len(seen)]
status = os.waitstatus_to_exitcode(os.wait()[1])
print(json.dumps([outcome, status]))
"""
    )

    assert result == [["<module>", 1000], 0]


def test_it_keeps_no_frame() -> None:
    """An exception raised while a fork waited keeps no object of its caller alive."""
    result = run(
        BUSY
        + """
import gc, weakref
def handler(*_):
    leave.set()
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, handler)
class Local: pass
def fork():
    local = Local()
    seen.append(weakref.ref(local))
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    if os.fork() == 0: os._exit(0)
seen = []
try: fork()
except KeyboardInterrupt: pass
gc.collect()
print(json.dumps([os.waitstatus_to_exitcode(os.wait()[1]), seen[0]() is None]))
"""
    )

    assert result == [0, True]


STRESS = """
import random
from pyreserve import *
FORKS = int(sys.argv[1]) if len(sys.argv) > 1 else N
class Struck(Exception): pass
region, arena, pool = reserve(8 * MiB), Arena(GiB), Pool(48)
bits, bump, pages = Bitmap(100_000), BumpArena(64 * MiB), PageAllocator(10_000)
stop, errors = threading.Event(), []
def work(number):
    at = number * MiB
    try:
        while not stop.is_set():
            region.commit(at, MiB); view = region.view(at, 8); view[0] = 1
            del view
            region.decommit(at, MiB)
            with arena.alloc(100) as block: block.view()[0] = 1
            pool.free(pool.alloc()); bits.set(number); pages.free(pages.alloc(2), 2)
            with reserve(MiB) as other: other.commit(0, MiB)
    except BaseException as error: errors.append(repr(error))
threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(8)]
for thread in threads: thread.start()
arena.start_scavenger(0)
struck = 0
def handler(*_):
    global struck
    struck += 1
    raise Struck
signal.signal(signal.SIGALRM, handler)
sys.setswitchinterval(1e-5)
caught = failed = started = 0
parent = os.getpid()
def child():
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(30)
    region.commit(8 * MiB - 4096, 4096); arena.alloc(8).free(); pool.alloc(); bits.set(9)
    bump.alloc(8); pages.alloc(1); reserve(MiB).commit(0, MiB)
    os._exit(0)
def forked():
    pid = os.fork()
    if pid == 0: child()
    return pid
def reap():
    global failed
    while True:
        try: pid, status = os.waitpid(-1, 0)
        except ChildProcessError: return
        failed += status != 0
def forks():
    global started, caught
    while started < FORKS:
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-3))
                started += 1
                forked()
            finally:
                if os.getpid() != parent: child()
            for _ in range(10_000):
                if signal.getitimer(signal.ITIMER_REAL)[0] == 0: break
        except Struck: caught += 1
        while True:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
                reap()
                break
            except Struck: caught += 1
while True:
    # CPython does not cover each jump of a loop by the try inside it.
    try:
        forks()
        break
    except Struck: caught += 1
signal.setitimer(signal.ITIMER_REAL, 0)
stop.set()
for thread in threads: thread.join()
arena.release()
print(json.dumps([started, failed, errors, struck - caught, struck > FORKS // 4]))
"""


@pytest.mark.heavy
def test_forks_under_threads_and_raising_handlers() -> None:
    """Hundreds of forks under eight threads and handlers that raise at any moment succeed."""
    started, failed, errors, lost, enough = run(STRESS.replace("else N", "else 300"))

    assert (started, failed, errors) == (300, 0, [])
    assert lost == 0
    assert enough


def test_masks_are_left_alone() -> None:
    """A fork changes no signal mask of parent or child, even while other threads fork."""

    def child() -> dict[str, int]:
        wrong = {"child": 0, "parent": 0}
        pyreserve.reserve(PAGE_SIZE).commit(0, PAGE_SIZE)

        def work(number: int) -> None:
            mask = {number}
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for _ in range(40):
                pid = os.fork()
                if pid == 0:
                    os._exit(signal.pthread_sigmask(signal.SIG_BLOCK, []) != mask)
                wrong["child"] += os.waitpid(pid, 0)[1] != 0
                wrong["parent"] += signal.pthread_sigmask(signal.SIG_BLOCK, []) != mask

        threads = [
            threading.Thread(target=work, args=(number,))
            for number in (signal.SIGUSR1, signal.SIGUSR2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return wrong

    assert witness.in_child(child) == {"child": 0, "parent": 0}


def test_a_collection_in_a_handler() -> None:
    """Finalisers that run in at-fork handlers may free any object."""
    result = run(
        """
import gc
def collect(): gc.collect()
os.register_at_fork(before=collect, after_in_parent=collect, after_in_child=collect)
from pyreserve import *
arena, pages, freed = Arena(GiB), PageAllocator(1000), []
class Last:
    def __init__(self):
        self.me, self.block, self.page = self, arena.alloc(8), pages.alloc()
    def __del__(self):
        self.block.free(); pages.free(self.page); freed.append(1)
gc.disable()
statuses = []
for _ in range(5):
    Last()
    pid = os.fork()
    if pid == 0: os._exit(0 if arena.in_use == pages.npages - pages.free_pages == 0 else 5)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps([statuses, len(freed)]))
"""
    )

    assert result == [[0] * 5, 5]
