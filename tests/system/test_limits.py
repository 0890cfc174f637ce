"""The table of limits: it is read alike for this process, another one and saved files."""

import errno
import resource
from pathlib import Path

import pytest

from helpers import witness
from pyreserve import GiB, KiB, MiB
from pyreserve._system import limits, proc
from pyreserve._system.limitbase import OWN, CapturedProcess, Limit, Use
from pyreserve._system.limits import LIMITS
from pyreserve._system.rlimits import RLIMIT_CORE, Rlimit
from pyreserve.doctor import diagnose
from pyreserve.procmem.judge.warnings import warnings
from pyreserve.procmem.read.snapshot import capture
from pyreserve.procmem.read.sources import LiveSource

RLIMITS = [limit for limit in LIMITS if isinstance(limit, Rlimit)]


def captured(
    limit: dict[str, int | None] | None = None,
    status: dict[str, int] | None = None,
    machine: dict[str, int] | None = None,
    cgroups: tuple[tuple[int, int], ...] = (),
    map_count: int = 50,
) -> CapturedProcess:
    """A captured process that has only these files."""
    return CapturedProcess(limit or {}, status or {}, machine or {}, cgroups, map_count)


def all_warnings(process: CapturedProcess) -> list[str]:
    """The warnings of all limits."""
    return [warning for limit in LIMITS for warning in limit.warnings(process)]


class TestTable:
    def test_names_are_unique(self) -> None:
        """Each limit has a name of its own, as `VMError.limit` gives it."""
        names = [limit.name for limit in LIMITS]

        assert len(set(names)) == len(names)
        assert all(names)

    def test_doctor_reports_the_table(self) -> None:
        """Each assessment of a limit is in the diagnosis, with the same state and change."""
        diagnosis = diagnose()

        assessments = [assessment for limit in LIMITS for assessment in limit.assess()]

        topics = {assessment.topic for assessment in assessments}
        assert {"RLIMIT_AS", "max_map_count", "overcommit"} <= topics
        for assessment in assessments:
            finding = diagnosis.about(assessment.topic)
            assert (finding.state, finding.change) == (assessment.state, assessment.change)

    @pytest.mark.parametrize("limit", RLIMITS, ids=lambda limit: limit.name)
    def test_a_resource_limit_has_its_row(self, limit: Rlimit) -> None:
        """The row of /proc/self/limits has the value that getrlimit returns."""
        rows = capture(LiveSource(None)).limits

        assert rows[limit.row] == OWN.rlimit(limit.number, limit.row)

    def test_a_captured_process_is_read_alike(self) -> None:
        """The limits and uses of this process are those of its captured files."""
        files = capture(LiveSource(None))
        process = CapturedProcess(
            files.limits, files.status, files.machine, files.cgroups, files.table.user_mappings
        )

        for limit in LIMITS:
            own, other = list(limit.uses(OWN)), list(limit.uses(process))
            assert [use.limit for use in own] == [use.limit for use in other]
            for use, saved in zip(own, other, strict=True):
                assert abs(use.used - saved.used) < max(64 * MiB, use.used // 10)


class TestRefusals:
    @pytest.mark.parametrize(
        ("verb", "err", "names"),
        [
            (
                "reserve",
                errno.ENOMEM,
                ["RLIMIT_AS", "max_map_count", "address space"],
            ),
            ("commit", errno.ENOMEM, ["RLIMIT_DATA", "max_map_count", "overcommit"]),
            (
                "map",
                errno.ENOMEM,
                ["RLIMIT_AS", "RLIMIT_DATA", "max_map_count", "overcommit", "address space"],
            ),
            ("commit", errno.EAGAIN, ["RLIMIT_MEMLOCK", "max_map_count"]),
            ("fork", errno.EAGAIN, ["RLIMIT_NPROC", "threads-max", "pid_max", "pids cgroup"]),
            ("reserve", errno.EPERM, ["mmap_min_addr"]),
            ("commit", errno.EPERM, []),
            ("discard", errno.EINVAL, []),
        ],
    )
    def test_limits_of_a_verb(
        self, verb: str, err: int, names: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A refusal asks the limits that refuse its verb with its errno, in this order."""
        asked: list[str] = []

        def asks(limit: Limit) -> None:
            monkeypatch.setattr(limit, "refusal", lambda *_: asked.append(limit.name))

        for limit in LIMITS:
            asks(limit)

        error = limits.refusal(verb, err, MiB)

        assert asked == names
        assert error.limit is None

    def test_a_fact_has_one_wording(self) -> None:
        """Refusal and finding give limit and use of RLIMIT_AS in the same words."""

        def child() -> tuple[str, str]:
            resource.setrlimit(resource.RLIMIT_AS, (64 * GiB, 64 * GiB))
            refused = limits.refusal("reserve", errno.ENOMEM, 63 * GiB + 1023 * MiB)
            return str(refused), diagnose().about("RLIMIT_AS").fact

        error, fact = witness.in_child(child)

        assert "RLIMIT_AS (ulimit -v) is 64 GiB, of which " in error
        assert fact.startswith("The limit (ulimit -v) is 64 GiB, of which ")
        assert error.endswith(" is in use")
        assert fact.endswith(" is in use.")


class TestWarnings:
    @pytest.mark.parametrize(
        ("process", "near"),
        [
            (captured({"address space": 1000 * KiB}, {"VmSize": 900}), "VSZ is 90 % of RLIMIT_AS"),
            (captured({"data size": 1000 * KiB}, {"VmData": 950}), "VmData is 95 % of RLIMIT_DATA"),
            (captured({"locked memory": 0}, {"VmLck": 4}), "VmLck is all of RLIMIT_MEMLOCK"),
            (captured(cgroups=((1000, 900),)), "its memory cgroup uses 900 B of 1000 B"),
            (
                captured(machine={"MemTotal": 1000, "MemAvailable": 100}),
                "the machine has 100 KiB of its 1000 KiB",
            ),
            (
                captured(machine={"max_map_count": 100}, map_count=90),
                "it has 90 mappings and vm.max_map_count is 100",
            ),
            (
                captured(
                    machine={"overcommit_memory": 2, "CommitLimit": 1000, "Committed_AS": 900}
                ),
                "vm.overcommit_memory is 2 and the system has promised 900 KiB of 1000 KiB",
            ),
        ],
    )
    def test_near_a_limit(self, process: CapturedProcess, near: str) -> None:
        """From 90 % of a limit on there is one warning, which names the limit."""
        (warning,) = all_warnings(process)

        assert warning.startswith(near)

    @pytest.mark.parametrize(
        "process",
        [
            captured(),
            captured({"address space": 1000 * KiB, "data size": None}, {"VmSize": 899}),
            captured({"address space": 1000 * KiB}),
            captured({"locked memory": 0}, {"VmLck": 0}),
            captured(cgroups=((1000, 899),)),
            captured(machine={"MemTotal": 1000, "MemAvailable": 101}),
            captured(machine={"MemTotal": 1000}),
            captured(machine={"max_map_count": 100}, map_count=89),
            captured(machine={"overcommit_memory": 0, "CommitLimit": 10, "Committed_AS": 900}),
            captured(machine={"overcommit_memory": 2, "CommitLimit": 0, "Committed_AS": 900}),
        ],
    )
    def test_far_from_all_limits(self, process: CapturedProcess) -> None:
        """Below 90 %, without a limit or with unknown figures there is no warning."""
        assert all_warnings(process) == []

    @pytest.mark.parametrize(
        ("limit", "piped", "dumps"),
        [
            ({}, 0, False),
            ({}, 1, True),
            ({"core file size": 0}, 0, False),
            ({"core file size": 0}, 1, True),
            ({"core file size": 4096}, 0, True),
            ({"core file size": None}, 0, True),
        ],
    )
    def test_whether_a_core_is_dumped(
        self, limit: dict[str, int | None], piped: int, dumps: bool
    ) -> None:
        """A core dump takes a limit above 0, or a program to which it is piped."""
        process = captured(limit, machine={"core_piped": piped})

        assert RLIMIT_CORE.dumps(process) is dumps

    def test_figures_of_explain(self) -> None:
        """The warnings count VSZ and mappings as explain does, not as status says."""
        files = capture(LiveSource(None))._replace(
            limits={"address space": GiB},
            machine={"max_map_count": 10},
            cgroups=(),
        )

        near = warnings(files, GiB, None, 9)
        far = warnings(files, GiB // 2, None, 8)

        assert [warning[:13] for warning in near] == ["VSZ is 100 % ", "it has 9 mapp"]
        assert far == []


class TestUse:
    @pytest.mark.parametrize(
        ("use", "left", "near"),
        [
            (Use(None, 5), None, False),
            (Use(10, 0), 10, False),
            (Use(10, 9), 1, True),
            (Use(10, 12), 0, True),
            (Use(0, 0), 0, False),
            (Use(0, 1), 0, True),
        ],
    )
    def test_the_unused_part_of_a_limit(self, use: Use, left: int | None, near: bool) -> None:
        """A limit leaves what is not used, never less than 0; without a limit nothing is near."""
        assert (use.left(), use.is_near()) == (left, near)


class TestReadingProc:
    def test_the_options_of_a_mount(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The last mount at a path hides the earlier ones."""
        (tmp_path / "self").mkdir()
        (tmp_path / "self/mounts").write_text(
            "proc /proc proc rw,relatime 0 0\nnone /proc/x tmpfs ro 0 0\n"
            "proc /proc proc rw,hidepid=invisible 0 0\n"
        )
        monkeypatch.setattr(proc, "_PROC", tmp_path)

        assert proc.mount_options("/proc") == ["rw", "hidepid=invisible"]
        assert proc.mount_options("/sys") == []

    def test_the_first_processor(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """cpu_info reads the fields of the first processor."""
        (tmp_path / "cpuinfo").write_text(
            "processor\t: 0\nmodel name\t: A: B\nflags\t\t: x hypervisor\n\nprocessor\t: 1\n\n"
        )
        monkeypatch.setattr(proc, "_PROC", tmp_path)

        assert proc.cpu_info() == {
            "processor": "0",
            "model name": "A: B",
            "flags": "x hypervisor",
        }

    def test_processes_and_their_number(self) -> None:
        """This process is listed, and there are at least as many tasks as processes."""
        import os

        assert os.getpid() in proc.processes()
        assert proc.task_count() >= 1

    def test_a_status_line_needs_a_tab(self) -> None:
        """A value may contain colons and tabs; text without a field is left out."""
        text = "Name:\ta:\tb\nUid:\t0\t0\t0\t0\nbroken\n"

        assert proc.parse_status(text) == {"Name": "a:\tb", "Uid": "0\t0\t0\t0"}
