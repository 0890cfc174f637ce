"""`explain`, `track`, `vsz` and others without some files of /proc, or without memory.

A preloaded library refuses to open them, as kernels without the file (ENOENT) and sandboxes
(EACCES, EPERM) do. Each test is a process of its own.
"""

import errno
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from helpers import subjects
from helpers.processes import COMMAND, environment
from helpers.subjects import kib_of
from helpers.witness import fresh_python
from pyreserve import MiB

# Heavy: each test starts a process or more.
pytestmark = pytest.mark.heavy

_HIDING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* HIDDEN: names of files of /proc, or /proc itself. */
static int hidden(const char *path) {
    const char *names = getenv("HIDDEN");
    if (path == NULL || names == NULL || strncmp(path, "/proc", 5) != 0)
        return 0;
    if (strcmp(names, "/proc") == 0)
        return 1;
    char copy[256];
    strncpy(copy, names, sizeof copy - 1);
    copy[sizeof copy - 1] = 0;
    const char *last = strrchr(path, '/') + 1;
    for (char *name = strtok(copy, ":"); name != NULL; name = strtok(NULL, ":"))
        if (strcmp(name, last) == 0)
            return 1;
    return 0;
}

static int refuse(void) {
    errno = atoi(getenv("HIDDEN_ERRNO"));
    return -1;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        int mode = va_arg(rest, int); \
        va_end(rest); \
        int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #name); \
        return hidden(path) ? refuse() : real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        int mode = va_arg(rest, int); \
        va_end(rest); \
        int (*real)(int, const char *, int, ...) = dlsym(RTLD_NEXT, #name); \
        return hidden(path) ? refuse() : real(folder, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define STAT(name, type) \
    int name(const char *path, struct type *out) { \
        int (*real)(const char *, struct type *) = dlsym(RTLD_NEXT, #name); \
        return hidden(path) ? refuse() : real(path, out); \
    }
STAT(stat, stat)
STAT(stat64, stat64)
STAT(lstat, stat)
STAT(lstat64, stat64)
"""

SMAPS = "smaps:smaps_rollup"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that hides files."""
    folder = tmp_path_factory.mktemp("hiding")
    return subjects.compiled(
        folder, "hiding.so", _HIDING, "-shared", "-fPIC", "-D_LARGEFILE64_SOURCE"
    )


@pytest.fixture(params=["ENOENT", "EACCES", "EPERM"])
def why(request: pytest.FixtureRequest) -> int:
    """The errno that opening a hidden file sets."""
    return int(getattr(errno, request.param))


class Hiding:
    """Runs Python or the command with hidden files."""

    def __init__(self, library: Path, names: str, why: int = errno.ENOENT) -> None:
        hidden = {"LD_PRELOAD": str(library), "HIDDEN": names, "HIDDEN_ERRNO": str(why)}
        self._environment = environment() | hidden

    def _run(self, *command: str | Path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command, env=self._environment, capture_output=True, text=True, check=False
        )

    def python(self, script: str) -> Any:
        """Return the JSON that a script prints."""
        done = self._run(sys.executable, "-c", textwrap.dedent(script))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def command(self, *arguments: str | int | Path, status: int = 0) -> str:
        """Return the output of the command: stderr if it fails, else stdout."""
        done = self._run(*COMMAND, *map(str, arguments))
        assert done.returncode == status, done.stderr
        return done.stderr if status else done.stdout


_TRACKED = """
    import json
    import pyreserve
    from pyreserve import MiB, explain, reserve, track
    with track() as t:
        region = reserve(100 * MiB)
        region.commit(0, 8 * MiB)
        region.view(0, 4 * MiB)[:] = b"1" * (4 * MiB)
    space = explain().to_dict()
    print(json.dumps([t.vsz, t.reserved, t.committed, t.rss, t.pss, str(t), space]))
"""


class TestNoRollup:
    """smaps is added up instead of smaps_rollup."""

    def test_explain_and_track(self, library: Path, why: int) -> None:
        """All figures are known; PSS is the sum over the mappings."""
        *figures, text, space = Hiding(library, "smaps_rollup", why).python(_TRACKED)

        vsz, reserved, committed, rss, pss = figures
        assert vsz == 100 * MiB
        assert reserved == 92 * MiB
        assert 8 * MiB <= committed < 16 * MiB
        assert 3 * MiB < rss < 12 * MiB
        assert 3 * MiB < pss < 12 * MiB  # also changes with who else maps the same libraries
        assert "not known" not in text
        assert space["missing"] == ["smaps_rollup"]
        assert sum(memory_class["kib"] for memory_class in space["classes"]) == space["vsz_kib"]
        assert 0 < space["uss_kib"] - space["mappings"] <= space["pss_kib"] <= space["rss_kib"]

    def test_vsz(self, library: Path, why: int) -> None:
        """`pyreserve vsz` works."""
        report = json.loads(Hiding(library, "smaps_rollup", why).command("vsz", "--json"))

        assert 0 < report["after"]["Pss_kib"] <= report["after"]["VmRSS_kib"]

    def test_another_process(self, library: Path, tmp_path: Path) -> None:
        """`explain --save` and watching another process work too."""
        hiding = Hiding(library, "smaps_rollup")
        with subjects.running(sys.executable, "-c", subjects.HOLD) as pid:
            subjects.stop(pid)
            hiding.command("explain", pid, "--save", tmp_path / "saved")
            record = tmp_path / "record.csv"
            watched = hiding.python(
                f"""
                import json
                from pathlib import Path
                from pyreserve.cli.watch.watched import Watched
                from pyreserve.procmem import sample
                with Watched({pid}, 1.0, sample, Path({str(record)!r})) as watched:
                    watched.sample()
                print(json.dumps(watched.row))
                """
            )
            rss = kib_of(pid, "smaps_rollup")["Rss"]

            assert not (tmp_path / "saved/smaps_rollup").exists()
            assert int(watched[4]) == rss
            assert 0 < int(watched[5]) <= rss
            assert record.read_text().splitlines()[1] == ",".join(watched)


class TestNoSmaps:
    """maps and status are used, and other figures are reported as unknown."""

    def test_explain_and_track(self, library: Path, why: int) -> None:
        """RSS is that of status; PSS, USS and the owners of memory are not known."""
        *figures, text, space = Hiding(library, SMAPS, why).python(_TRACKED)

        vsz, reserved, committed, rss, pss = figures
        assert (vsz, reserved, pss) == (100 * MiB, 92 * MiB, None)
        assert committed >= 8 * MiB
        assert 3 * MiB < rss < 12 * MiB
        assert "PSS not known (smaps can't be read)" in text
        assert space["missing"] == ["smaps", "smaps_rollup"]
        assert (space["pss_kib"], space["uss_kib"]) == (None, None)
        assert space["rss_kib"] > 4096
        assert sum(memory_class["kib"] for memory_class in space["classes"]) == space["vsz_kib"]
        assert sum(owner["kib"] for owner in space["owners"]) == space["vsz_kib"]
        assert "smaps can't be read" in space["verdict"]
        regions = next(owner for owner in space["owners"] if owner["name"] == "pyreserve regions")
        assert (regions["kib"], regions["rss_kib"]) == (100 << 10, None)

    def test_vsz(self, library: Path) -> None:
        """Screen and JSON report PSS as unknown."""
        hiding = Hiding(library, SMAPS)

        report = json.loads(hiding.command("vsz", "--json"))
        screen = hiding.command("vsz")

        assert report["after"]["Pss_kib"] is None
        assert report["after"]["VmRSS_kib"] > 0
        assert [line.split() for line in screen.splitlines() if line.startswith("PSS")] == [
            ["PSS", "?", "?", "smaps", "can't", "be", "read"]
        ]

    def test_another_process(self, library: Path, tmp_path: Path) -> None:
        """The screen shows no unknown figure; saved files give the same explanation."""
        hiding = Hiding(library, SMAPS)
        with subjects.running(sys.executable, "-c", subjects.HOLD) as pid:
            subjects.stop(pid)
            screen = hiding.command("explain", pid)
            plain = json.loads(hiding.command("explain", pid, "--json"))
            saved = json.loads(
                hiding.command("explain", pid, "--save", tmp_path / "saved", "--json")
            )

            assert "PSS ?, USS ?" in screen
            assert "accessible, in memory or not" in screen
            assert "smaps can't be read" in " ".join(screen.split())
            assert plain["rss_kib"] == kib_of(pid, "status")["VmRSS"]
            assert (saved["rss_kib"], saved["classes"]) == (plain["rss_kib"], plain["classes"])
            assert saved["missing"] == plain["missing"] == ["smaps", "smaps_rollup"]

    def test_no_picture(self, library: Path, tmp_path: Path) -> None:
        """A picture needs smaps: it is refused and no file is written."""
        picture = tmp_path / "a.png"

        refused = Hiding(library, SMAPS).command("explain", "--plot", picture, status=1)

        assert refused.count("\n") == 1
        assert "smaps" in refused
        assert not picture.exists()

    def test_it_is_watched_and_scraped(self, library: Path) -> None:
        """An unknown figure is an empty field, and no metric."""
        row, metrics = Hiding(library, SMAPS).python(
            """
            import json, os
            from prometheus_client import CollectorRegistry, generate_latest
            from pyreserve import prometheus
            from pyreserve.cli.watch.watched import Watched
            from pyreserve.procmem import sample
            with Watched(os.getpid(), 1.0, sample, None) as watched:
                watched.sample()
            registry = CollectorRegistry()
            prometheus.register_process(registry=registry)
            print(json.dumps([watched.row, generate_latest(registry).decode()]))
            """
        )

        assert int(row[4]) > 0
        assert row[5] == ""
        assert 'pyreserve_process_up{process="self"} 1.0' in metrics
        assert "pyreserve_process_resident_bytes{" in metrics
        assert "proportional_bytes{" not in metrics
        assert "unique_bytes{" not in metrics

    def test_its_sums_alone(self, library: Path) -> None:
        """With smaps_rollup PSS is known, and with PAGEMAP_SCAN all but VmFlags."""
        *_, pss, text, space = Hiding(library, "smaps").python(_TRACKED)

        assert 3 * MiB < pss < 12 * MiB  # also changes with who else maps the same libraries
        assert "not known" not in text
        assert space["missing"] == ["smaps"]
        assert space["pss_kib"] > 4096
        assert sum(memory_class["kib"] for memory_class in space["classes"]) == space["vsz_kib"]

    def test_status_as_well(self, library: Path) -> None:
        """Without status too, resident memory is unknown, and the error says so."""
        told = Hiding(library, f"{SMAPS}:status").python(
            """
            import json
            from pyreserve.procmem import explain, sample
            try:
                sample()
            except PermissionError as error:
                space = explain()
                figures = space.rss, space.swap, space.page_tables
                print(json.dumps([str(error), space.missing, figures]))
            """
        )

        assert "none of smaps_rollup, smaps and status" in told[0]
        assert told[1:] == [["smaps", "smaps_rollup", "status"], [None] * 3]


_REFUSED = """
    import json
    from pyreserve import explain, track
    from pyreserve.procmem import sample
    told = []
    for call in (explain, track, sample):
        try:
            call()
        except OSError as error:
            told.append([type(error).__name__, str(error)])
    print(json.dumps(told))
"""


def test_no_proc_at_all(library: Path) -> None:
    """The error says that /proc is not mounted, not that this process has ended."""
    told = Hiding(library, "/proc").python(_REFUSED)

    assert [name for name, _ in told] == ["AccessError"] * 3
    assert all("/proc is not mounted" in text for _, text in told)


@pytest.mark.parametrize("err", [errno.ENOENT, errno.EACCES])
def test_no_maps(library: Path, err: int) -> None:
    """With hidden maps, this process is not reported as ended."""
    told = Hiding(library, "maps", err).python(_REFUSED)

    assert [name for name, _ in told] == ["AccessError"] * 3
    assert all("sandbox" in text and "ended" not in text for _, text in told)


_FULL = """
    import json, mmap
    from pathlib import Path
    from pyreserve import OutOfMemoryError, PAGE_SIZE, explain, reserve, track
    from pyreserve.procmem import sample

    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    region = reserve(2 * limit * PAGE_SIZE, mode="noreserve")
    region.commit(0, region.size)
    tracked = track()
    tracked.__enter__()
    page = 1
    try:
        while True:
            region.decommit(page * PAGE_SIZE, PAGE_SIZE)
            page += 2
    except OutOfMemoryError:
        pass
    kept = []
    try:
        while True:  # the last entries, which no split fits in; shared ones do not merge
            kept.append(mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS))
    except OSError:
        pass
    told = None
    try:
        explain()
    except OutOfMemoryError as error:
        told = [str(error), error.limit, error.errno]
    found = [limit, told, sample().mappings, tracked.mappings]
    kept.clear()
    region.release()
    print(json.dumps([*found, explain().mappings, sample().mappings]))
"""


def test_a_full_map_table() -> None:
    """At vm.max_map_count `track` needs a few KiB, and `explain` names the limit."""
    limit, told, sampled, tracked, *after = fresh_python(_FULL)

    text, name, err = told
    assert (name, err) == ("max_map_count", errno.ENOMEM)
    assert f"vm.max_map_count is {limit:,}" in text
    assert re.search(r"the process has [\d,]{6,} mappings", text)
    assert sampled > limit - 4
    assert limit - 1000 < tracked < sampled
    assert all(count < 1000 for count in after)
