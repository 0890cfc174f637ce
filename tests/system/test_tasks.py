"""Limits that refuse a fork: each is reached in a child, and the refusal names it with numbers."""

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import witness
from pyreserve import PAGE_SIZE
from pyreserve._native import ffi, lib
from pyreserve._system import proc, tasks
from pyreserve._system.limits import refusal, refusing_limit
from pyreserve.costs import child, plan

_NOBODY = 54321  # an id that nobody has


def fork() -> tuple[int, str, str | None]:
    """Fork; return the errno and the message of the refusal."""
    process = ffi.new("int *")
    err = lib.sys_fork(process)
    if err == 0:
        lib.sys_reap(process[0])
        return 0, "", None
    refused = refusal("fork", err, PAGE_SIZE)
    return err, str(refused.strerror), refused.limit


def _be_nobody(processes: int) -> None:
    """Switch to an unprivileged user ID with a limit on processes."""
    if os.getuid() == 0:
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, hard))


class TestProcessLimit:
    def test_the_refusal_names_it(self) -> None:
        """A fork refused by RLIMIT_NPROC names it, not RLIMIT_MEMLOCK."""

        def in_the_child() -> tuple[tuple[int, str, str | None], int]:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
            _be_nobody(1)
            return fork(), os.getuid()

        (err, why, limit), user = witness.in_child(in_the_child)

        assert err == errno.EAGAIN
        assert limit == "RLIMIT_NPROC"
        assert f"RLIMIT_NPROC (ulimit -u) is 1, and user {user} has " in why

    def test_forks_below_the_limit(self) -> None:
        """Below the limit there is no refusal and no limit is named."""

        def in_the_child() -> tuple[tuple[int, str, str | None], object]:
            _be_nobody(resource.getrlimit(resource.RLIMIT_NPROC)[0])
            return fork(), refusing_limit("fork", errno.EAGAIN, 0)

        assert witness.in_child(in_the_child) == ((0, "", None), (None, None))

    def test_the_costs_say_it(self) -> None:
        """Cells left empty by a refused fork give the reason."""
        forking = (
            program
            for group in plan(longest=PAGE_SIZE, details=True).groups
            for program in group.programs
            if any(step.verb == "FORK" for step in program.steps)
        )
        program = next(forking)

        def in_the_child() -> str:
            _be_nobody(1)
            assert "(EAGAIN): RLIMIT_NPROC (ulimit -u) is 1" in child._no_thread(errno.EAGAIN)
            try:
                child.run(program, 1)
            except child.Refused as refused:
                verb = program.steps[refused.step].verb.lower()
                return str(refusal(verb, refused.err, PAGE_SIZE))
            return "not refused"

        why = witness.in_child(in_the_child)

        assert "fork of " in why
        assert "refused (EAGAIN): RLIMIT_NPROC (ulimit -u) is 1" in why


class TestMachineLimits:
    @pytest.mark.parametrize(
        ("setting", "name"), [("threads-max", "threads-max"), ("pid_max", "pid_max")]
    )
    def test_the_machine_is_full(
        self, setting: str, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """System-wide limits are named with their numbers."""
        read = proc.kernel_setting
        monkeypatch.setattr(
            proc, "kernel_setting", lambda key: "2" if key == setting else read(key)
        )

        limit, clause = refusing_limit("fork", errno.EAGAIN, 0)

        assert limit == name
        assert f"kernel.{setting} is 2, and the machine has " in str(clause)


@pytest.fixture
def _cgroup() -> Iterator[Path]:
    """A pids cgroup of our own, of the version that is mounted."""
    for root in (tasks._PIDS_ROOTS[1], tasks._PIDS_ROOTS[0]):
        place = Path(root) / f"pyreserve-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            place.mkdir()
            if (place / "pids.max").exists():
                yield place
                place.rmdir()
                return
            place.rmdir()
    pytest.skip("needs root and a mounted pids controller")


class TestCgroup:
    def test_a_full_group_is_named(self, _cgroup: Path) -> None:  # noqa: PT019
        """A real cgroup with pids.max 1 refuses a second process."""

        def in_the_child() -> tuple[int, str, str | None]:
            (_cgroup / "cgroup.procs").write_text(str(os.getpid()))
            (_cgroup / "pids.max").write_text("1")
            refusal = fork()
            (_cgroup.parent / "cgroup.procs").write_text(str(os.getpid()))
            return refusal

        err, why, limit = witness.in_child(in_the_child)

        assert (err, limit) == (errno.EAGAIN, "pids cgroup")
        assert f"pids.max of the cgroup {_cgroup} is 1, and it has 1 processes" in why

    @pytest.mark.parametrize("version", [1, 2])
    def test_both_versions(
        self, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The innermost full cgroup is named, in both versions; one without a limit is skipped."""
        proc_dir, groups = tmp_path / "proc", tmp_path / "groups"
        (proc_dir / "self").mkdir(parents=True)
        line = "0::/a/b\n" if version == 2 else "1:cpu:/\n8:pids:/a/b\n"
        (proc_dir / "self/cgroup").write_text(line)
        (groups / "a/b").mkdir(parents=True)
        for place, most in ((groups / "a/b", "max"), (groups / "a", "1200")):
            (place / "pids.max").write_text(f"{most}\n")
            (place / "pids.current").write_text("1200\n")
        monkeypatch.setattr(proc, "_PROC", proc_dir)
        monkeypatch.setattr(tasks, "_PIDS_ROOTS", (str(groups), str(groups)))

        assert tasks.LIMITS[-1].refusal(0, None) == (
            f"pids.max of the cgroup {groups / 'a'} is 1,200, and it has 1,200 processes and "
            "threads"
        )
