"""Regressions: former crashes, hangs and corruptions, each tested in a process of its own."""

import subprocess
import sys

import pytest

from helpers.witness import PATIENCE
from pyreserve.units import WORD

pytestmark = pytest.mark.skipif(WORD != 8, reason="needs 64-bit addresses")

# From Python 3.12 on, a fork in a process with threads warns.
PRELUDE = """
import gc, os, signal, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from pyreserve import *
from pyreserve import PAGE_SIZE as P
from pyreserve._system import proc
"""
FACTS: dict[str, str] = {}
FACTS["a view that a finaliser uses or saves pins its bytes and keeps its region mapped"] = """
r=reserve(1<<16); r.commit(0,P)
saved=[]
class C:
    def __del__(self):
        try: r.decommit(0,P)
        except BufferError as e: saved.append(str(e))
        self.v[0]; saved.append(self.v)
c=C(); c.v=r.view(0,P); c.me=c; del c; gc.collect()
assert "live view" in saved[0], saved
try: r.release(); assert 0
except BufferError: pass
saved[1][0]=3; saved.clear(); gc.collect(); r.release()
class D:
    def __del__(self): self.v[0]=1; saved.append(self.v)
d=D(); d.r=reserve(1<<16); d.r.commit(0,P); d.v=d.r.view(0,P); d.me=d; base=d.r.base
del d; gc.collect()
saved[0][5]=1; assert any(m.start<=base<m.end for m in proc.read_maps())
saved.clear(); gc.collect(); assert not any(m.start<=base<m.end for m in proc.read_maps())
"""
FACTS["forks and growths that make regions never wait for each other"] = """
import threading,time
stop=False
def g():
    while not stop:
        with Arena(layout="go1.11/amd64") as a:
            for _ in range(6): a.grow(64<<20)
t=threading.Thread(target=g); t.start()
for _ in range(150):
    p=os.fork()
    if p==0: os._exit(0)
    os.waitpid(p,0)
stop=True; t.join()
"""
FACTS["a refused growth takes back nothing that was committed before"] = """
import resource
a=Arena(layout="go-tip-2014-12/amd64"); r=a.region; r.commit(0,P); v=r.view(0,P)
u=proc.status_kib()["VmData"]<<10
resource.setrlimit(resource.RLIMIT_DATA,(u+(8<<20),-1))
try: a.grow(32<<20); assert 0
except MemoryError as e: assert e.limit=="RLIMIT_DATA",e
assert r.committed_runs()==[(0,P)], r.committed_runs()
v[0]
"""
FACTS["nobody takes the memory of an arena away under it"] = """
a=Arena(layout="go-tip-2014-12/amd64"); b=a.alloc(1<<20)
hb=a.heap_bitmap; lo,hi=a.placement.mapped_bitmap()
for take in (lambda: a.region.decommit(lo-a.region.base, hi-lo), a.region.release,
             lambda: a.region.discard(lo-a.region.base, hi-lo), lambda: a.region.__exit__()):
    try: take(); assert 0
    except StateError as e: assert "part of an arena" in str(e), e
assert hb.at(b.address)==1; b.free(); a.release()
"""
FACTS["an arena that is interrupted while it opens its heap has one heap"] = """
for i in range(400):
    a=Arena(8<<20); got=[]
    def h(*_):
        try: got.append(a.alloc(8))
        except RuntimeError: pass
    signal.signal(signal.SIGALRM, h)
    signal.setitimer(signal.ITIMER_REAL, 2e-6*(i+1)); b=a.alloc(8)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert not any(block.freed for block in [b,*got]), i
    assert len(list(a.blocks()))==1+len(got)
    a.release()
"""
FACTS["no view is made between the look for views and what takes the bytes away"] = """
a=Arena(64<<20); keep=a.alloc(8); v=keep.view()
b=a.alloc(2<<20); off=b.offset; w=b.view(); w[0]=1; del w; r=a.region
from pyreserve._region.viewtable import ViewTable
made=[]; look=ViewTable.live
def late(self,*arguments):
    found=look(self,*arguments)
    try: made.append(r.view(off,8))
    except RuntimeError: made.append(None)
    return found
ViewTable.live=late
b.free(); assert made==[None], made
a.trim(); assert set(made)=={None} and len(made)>1, made
"""
FACTS["a block that is found and freed while it is cleared does no harm"] = """
a=Arena(256<<20); a.alloc(100<<20).free(); stop=False; errors=[]
def thief():
    while not stop:
        for b in a.blocks():
            try: b.free()
            except ValueError: pass
        a.trim()
for _ in range(3): fill=a.alloc(60<<20); fill.free()
t=threading.Thread(target=thief); t.start()
for _ in range(40):
    try: a.alloc(60<<20, zero=True)
    except MemoryError: pass
stop=True; t.join()
"""
FACTS["a list of runs survives a release in its middle"] = """
r=reserve(1<<30); [r.commit(i*P,P) for i in range(0,40000,2)]
signal.signal(signal.SIGALRM, lambda *_: r.release()); signal.setitimer(signal.ITIMER_REAL,.002)
try: r.committed_runs()
except ValueError: pass
"""
FACTS["an argument that releases the region can not make a call work on another"] = """
o=[]
r=reserve(1<<16); r.commit(0,P)
class L:
    def __bool__(s):
        r.release(); n=reserve(1<<16); n.commit(0,P); n.view(0,P)[0]=99; o.append(n); return False
try: r.discard(0,P,lazy=L())
except ValueError: pass
assert o[0].view(0,1)[0]==99
"""
FACTS["a length beyond the region is refused at once, under a view too"] = """
r=reserve(P); r.commit(0,P); v=r.view(0,10)
try: r.decommit(0,2**48); assert 0
except ValueError: pass
"""
FACTS["the buffer behind a view shows the bytes of the view alone"] = """
r=reserve(2 * P); r.commit(P,P); assert len(bytes(r.view(P,1).obj))==1
"""
FACTS["a growth that interrupts a growth never hands out the same block"] = """
a=Arena(layout="go-tip-2014-12/amd64")
def h(*_):
    try: blocks.append(a.grow(2 * P))
    except RuntimeError: pass
blocks=[]
signal.signal(signal.SIGALRM,h); signal.setitimer(signal.ITIMER_REAL,.0005,.0005)
for _ in range(3000): blocks.append(a.grow(2 * P))
signal.setitimer(signal.ITIMER_REAL,0)
assert len(set(blocks))==len(blocks) and a.in_use==a.placement.used==2 * P*len(blocks)
"""
FACTS["an exception out of a signal handler leaves a growth undone"] = """
class X(Exception): pass
def h(*_): raise X
signal.signal(signal.SIGALRM,h)
a=Arena(layout="go1.4/amd64"); n=0
import random
i=0
while i<3000:
    try:
        i+=1
        signal.setitimer(signal.ITIMER_REAL, random.random()*.0002+1e-6,.05)
        a.grow(2 * P)
        while 1: pass
    except X:
        signal.setitimer(signal.ITIMER_REAL,0); n+=1
a.grow(2 * P); print(n, a)
"""
FACTS["an exception out of a signal handler leaves views possible"] = """
class X(Exception): pass
def h(*_): raise X
signal.signal(signal.SIGALRM,h)
import random
i=0
while i<3000:
    r=reserve(P); r.commit(0,P)
    try:
        i+=1
        signal.setitimer(signal.ITIMER_REAL, random.random()*.00005+1e-6,.05)
        r.view(0,10)
        while 1: pass
    except X: signal.setitimer(signal.ITIMER_REAL,0)
    r.view(0,10); r.release()
"""
FACTS["a decommit that a full map table refuses is undone"] = """
r=reserve(1<<30,mode="noreserve"); r.commit(0,1<<30)
i=1
try:
    while True: r.decommit(i*P,P); i+=2
except MemoryError as e: assert e.limit=="max_map_count"
assert r.committed == (1 << 30) - P * ((i - 1) // 2)
r.release()
"""
FACTS["odd arguments meet the documented exceptions"] = """
for f in (lambda: reserve(10**400), lambda: Arena(10**400)):
    try: f(); assert 0
    except MemoryError as e: assert e.limit=="address space",e
for kw in (dict(mode=[]),dict(fork={}),dict(huge_pages=[])):
    try: reserve(P,**kw); assert 0
    except ValueError: pass
class X:
    def __index__(s): return 1<<44
reserve(P,at=X()).release()
list(Bitmap(100).runs(value=2)); list(Bitmap(100).runs(value=[]))
import copy
for o in (Arena(2 * P),reserve(P),Bitmap(5)):
    try: copy.copy(o); assert 0
    except TypeError: pass
Arena(2 * P).grow(2 * P)
r=reserve(P); r.release(); repr(r)
try: r.release(); assert 0
except ValueError: pass
for n in ("commit","decommit","discard","populate","view","is_committed"):
    try: getattr(r,n)(0,P); assert 0,n
    except ReleasedError: pass
"""
FACTS["what a region says of itself can not be overwritten"] = """
r = reserve(1 << 20); r.commit(0, 1 << 20)
for name in ("released", "size", "mode", "fork", "name"):
    try: setattr(r, name, True); assert 0, name
    except AttributeError: pass
"""
FACTS["a refused release shows its reason and nothing else"] = """
r = reserve(1 << 20); r.commit(0, 1 << 20); v = r.view(0, 10)
try: r.release(); assert 0
except BufferError as refused: assert refused.__context__ is None
b = Bitmap(100); b.set(5); assert 5 in b and 6 not in b and 1000 not in b
"""


@pytest.mark.parametrize("fact", FACTS)
def test_it_holds(fact: str) -> None:
    """The named fact holds: the process exits with status 0 and writes nothing to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + FACTS[fact]],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
