"""Diagnoses: of this machine, checked against /proc, and with simulated settings."""

import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

import pyreserve
from pyreserve import PAGE_SIZE, KiB, MiB
from pyreserve._system import machine, proc
from pyreserve._system.features import FEATURES, Feature
from pyreserve.cli import doctor as doctor_command
from pyreserve.cli.screen import Screen
from pyreserve.doctor import (
    STATES,
    Diagnosis,
    Finding,
    diagnose,
    features,
    limits,
    pages,
    surroundings,
)
from pyreserve.doctor.findings import examine

COMMAND = [sys.executable, "-m", "pyreserve", "doctor"]
LIMITS = {"-v": 4_000_000, "-d": 3_000_000, "-l": 64, "-s": 4096, "-c": 0}  # as ulimit counts


def environment() -> dict[str, str]:
    """The environment without variables that change terminal output."""
    excluded = ("COLOR", "COLUMNS", "LINES", "TTY", "TERM", "GITHUB_ACTIONS")
    return {k: v for k, v in os.environ.items() if not any(word in k for word in excluded)}


def run(shell: str, *before: str, arguments: str = "--json") -> subprocess.CompletedProcess[str]:
    """Run the command after a line of shell, under the command `before` if given."""
    return subprocess.run(
        [*before, "sh", "-c", f'{shell} && exec "$@"', "sh", *COMMAND, *arguments.split()],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )


def findings_of(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    """The findings that a run printed as JSON, by topic."""
    assert (done.returncode, done.stderr) == (0, "")
    return {finding["topic"]: finding for finding in json.loads(done.stdout)["findings"]}


@pytest.fixture(scope="module")
def here() -> Diagnosis:
    """The diagnosis of this process."""
    return diagnose()


@pytest.fixture(scope="module")
def limited() -> dict[str, dict[str, Any]]:
    """The findings of a process under ulimit, which sets soft and hard limits."""
    return findings_of(
        run(" && ".join(f"ulimit {option} {value}" for option, value in LIMITS.items()))
    )


def only(findings: Iterator[Finding]) -> Finding:
    """The single finding of a check."""
    (finding,) = findings
    return finding


def check(topic: str) -> Iterator[Finding]:
    """The findings about one limit."""
    return iter(dict(limits.CHECKS)[topic]())


class TestDiagnosis:
    def test_findings_are_sorted_by_state(self, here: Diagnosis) -> None:
        """Findings are sorted by state, and each has a topic of its own."""
        states = [STATES.index(finding.state) for finding in here.findings]
        topics = [finding.topic for finding in here.findings]

        assert states == sorted(states)
        assert len(set(topics)) == len(topics)
        assert sum(here.counts().values()) == len(topics)

    def test_the_limits_of_errors_have_findings(self, here: Diagnosis) -> None:
        """Each limit that a VMError can name is a topic; an unknown topic raises KeyError."""
        for limit in (
            "RLIMIT_AS",
            "RLIMIT_DATA",
            "RLIMIT_MEMLOCK",
            "overcommit",
            "max_map_count",
            "address space",
        ):
            assert here.about(limit).topic == limit
        with pytest.raises(KeyError, match=r"no finding 'rlimit_as'; topics: .*RLIMIT_AS"):
            here.about("rlimit_as")

    def test_limited_findings_name_a_change(self, here: Diagnosis) -> None:
        """Limited and missing findings name a change and its effect; texts are sentences."""
        for finding in here.findings:
            assert re.fullmatch(r".*\.", finding.fact)
            assert re.fullmatch(r".*\.", finding.allows)
            assert (finding.change is None) == (finding.effect is None)
            assert finding.state == "good" or finding.change

    def test_commands_are_a_shells(self, here: Diagnosis) -> None:
        """sh parses each change that is marked as a command."""
        for finding in here.findings:
            if finding.change is not None and finding.command:
                subprocess.run(["sh", "-n", "-c", finding.change], check=True)

    def test_the_json_has_all_of_it(self, here: Diagnosis) -> None:
        """The JSON has its schema version, and the findings can be rebuilt from it."""
        data = json.loads(here.to_json())

        assert data["schema"] == 1
        assert data["pid"] == os.getpid()
        assert data["counts"] == here.counts()
        assert tuple(Finding(**finding) for finding in data["findings"]) == here.findings

    def test_the_text_has_all_of_it(self, here: Diagnosis) -> None:
        """str() has a line for each finding with its state, and ends with the counts."""
        lines = str(here).splitlines()

        assert lines[0] == here.title()
        for finding in here.findings:
            line = f"{finding.state:9}{finding.topic}: {finding.fact} {finding.allows}"
            at = lines.index(line)
            consequences = [line.strip() for line in lines[at + 1 : at + 4]]
            assert finding.change is None or f"change: {finding.change}" in consequences
            assert finding.risk is None or f"risk: {finding.risk}" in consequences
        assert lines[-1] == here.summary()

    def test_a_notebook_shows_a_table(self) -> None:
        """The HTML is well-formed, texts are escaped, and unprintable characters are visible."""
        findings = (
            Finding("a", "limited", "1 < 2.", "No & so.", "echo 1 > /x", "More.", "<b>."),
            Finding("b", "good", "It works: \x1b.", "All."),
        )
        diagnosis = Diagnosis(None, "6.1", "x86_64", "3.12", 1, findings)

        rows = ElementTree.fromstring(diagnosis._repr_html_()).findall("table/tbody/tr")
        assert [[cell.text or "" for cell in row] for row in rows] == [
            ["limited", "a", "1 < 2. No & so.", "echo 1 > /x", "More.", "<b>."],
            ["good", "b", "It works: \\x1b. All.", "", "", ""],
        ]
        assert "\x1b" not in str(diagnosis)

    def test_a_finding_does_not_change(self, here: Diagnosis) -> None:
        """Findings are frozen and hashable."""
        with pytest.raises(dataclasses.FrozenInstanceError):
            here.findings[0].topic = "other"  # type: ignore[misc]
        assert len(set(here.findings)) == len(here.findings)


class TestFacts:
    """Findings about this process agree with what the kernel does."""

    def test_the_largest_reservation(self) -> None:
        """The largest reservation succeeds, within 1/64, and a larger one fails."""
        most = diagnose().about("address space").values["largest_reservation"]

        pyreserve.reserve(most - most // 64).release()
        with pytest.raises(pyreserve.OutOfMemoryError):
            pyreserve.reserve(most + most // 64)

    def test_map_entries(self) -> None:
        """Map entries are counted as in /proc/self/maps; a separate range takes two."""
        with pyreserve.reserve(64 * PAGE_SIZE, guard=True) as region:
            diagnose()
            before = diagnose().about("max_map_count").values
            for page in range(1, 40, 2):
                region.commit(page * PAGE_SIZE, PAGE_SIZE)
            after = diagnose().about("max_map_count").values

        assert before["limit"] == int(Path("/proc/sys/vm/max_map_count").read_text())
        assert before["pieces"] == (before["limit"] - before["used"]) // 2
        assert 19 <= before["pieces"] - after["pieces"] <= 22

    def test_accounting(self, here: Diagnosis) -> None:
        """The mode and limits of overcommit agree with /proc."""
        values = here.about("overcommit").values

        assert values["mode"] == int(Path("/proc/sys/vm/overcommit_memory").read_text())
        assert values["commit_limit"] == proc.meminfo_kib()["CommitLimit"] * KiB
        swap = here.about("swap")
        assert (swap.state == "good") == (swap.values["total"] > 0)
        assert swap.values["total"] == proc.meminfo_kib()["SwapTotal"] * KiB

    def test_features_are_the_capabilities(self, here: Diagnosis) -> None:
        """A feature is good exactly if its capability is true."""
        offered = pyreserve.capabilities()

        for feature in FEATURES:
            assert (here.about(feature.topic).state == "good") == getattr(offered, feature.field)

    def test_names_in_maps(self, here: Diagnosis) -> None:
        """A region's name appears in /proc/self/maps exactly if names are good."""
        with pyreserve.reserve(PAGE_SIZE, name="doctor"):
            shows = any(mapping.name == "[anon:doctor]" for mapping in proc.read_maps())

        assert shows == (here.about("names in maps").state == "good")

    def test_the_core_pattern(self, here: Diagnosis) -> None:
        """The core pattern agrees with /proc."""
        pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()

        assert here.about("core dumps").values["core_pattern"] == pattern

    def test_extras(self, here: Diagnosis) -> None:
        """Extras list the installed versions; developer extras are left out."""
        topics = [f.topic for f in here.findings if f.topic.startswith("extra ")]

        assert {"extra cli", "extra numpy", "extra plot"} <= set(topics)
        assert not {"extra dev", "extra test", "extra bench"} & set(topics)
        for name, version in here.about("extra cli").values.items():
            assert version == metadata.version(name)


class TestLimits:
    """Findings under limits that ulimit sets in a shell."""

    @pytest.mark.parametrize(
        ("topic", "option"), [("RLIMIT_AS", "-v"), ("RLIMIT_DATA", "-d"), ("RLIMIT_CORE", "-c")]
    )
    def test_it_names_limit_and_change(
        self, topic: str, option: str, limited: dict[str, dict[str, Any]]
    ) -> None:
        """A finding has the limit that was set and the command that lifts it."""
        finding = limited["core dumps" if option == "-c" else topic]

        if option == "-c" and finding["values"]["core_pattern"].startswith("|"):
            pytest.skip("core dumps go to a program, whatever their limit")
        assert finding["state"] == "limited"
        assert topic in f"{finding['topic']}: {finding['fact']}"
        assert f"(ulimit {option}) is " in finding["fact"]
        assert finding["values"]["limit"] == LIMITS[option] * KiB
        assert finding["change"] == f"ulimit {option} unlimited"

    def test_locked_memory(self, limited: dict[str, dict[str, Any]]) -> None:
        """RLIMIT_MEMLOCK limits processes without CAP_IPC_LOCK."""
        finding = limited["RLIMIT_MEMLOCK"]

        assert finding["values"]["limit"] == LIMITS["-l"] * KiB
        if proc.capable(14):
            assert (finding["state"], finding["change"]) == ("good", None)
        else:
            assert (finding["state"], finding["change"]) == ("limited", "ulimit -l unlimited")

    def test_a_hard_limit_takes_root(self, limited: dict[str, dict[str, Any]]) -> None:
        """The risk names the hard limit for a process without CAP_SYS_RESOURCE."""
        warns = "hard limit" in (limited["RLIMIT_AS"]["risk"] or "")

        assert warns != proc.capable(24)

    def test_the_largest_reservation_under_a_limit(
        self, limited: dict[str, dict[str, Any]]
    ) -> None:
        """Under RLIMIT_AS the largest reservation is the unused part of the limit."""
        values = limited["RLIMIT_AS"]["values"]

        most = limited["address space"]["values"]["largest_reservation"]
        assert abs(values["limit"] - values["used"] - most) < MiB
        assert limited["RLIMIT_STACK"]["values"] == {"limit": LIMITS["-s"] * KiB}

    def test_the_change_has_the_effect(self) -> None:
        """The command that a finding names lifts the limit."""
        before = findings_of(run("ulimit -S -v 4000000"))["RLIMIT_AS"]
        after = findings_of(run(f"ulimit -S -v 4000000 && {before['change']}"))["RLIMIT_AS"]

        assert (before["state"], after["state"]) == ("limited", "good")

    def test_an_empty_sys(self) -> None:
        """With an empty /sys the findings name the unreadable files and the namespace."""
        if shutil.which("unshare") is None:
            pytest.skip("no unshare here")
        done = run("mount -t tmpfs none /sys", "unshare", "--map-root-user", "--mount")
        if "unshare" in done.stderr or "mount:" in done.stderr:
            pytest.skip("namespaces are unavailable here")

        findings = findings_of(done)

        for topic in ("cgroup limit", "transparent huge pages", "hugetlb pools", "host"):
            assert findings[topic]["state"] == "limited"
            assert "can't be read here: /sys" in findings[topic]["fact"]
        assert "user" in findings["container"]["values"]["namespaces"]
        assert findings["other processes"]["values"]["cap_sys_ptrace"] is False


class TestOtherMachines:
    """Settings of other machines, simulated in the readers of /proc and /sys."""

    def test_strict_overcommit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In overcommit mode 2 the unused commit limit bounds commits in both modes."""
        settings = {
            "overcommit_memory": 2,
            "overcommit_ratio": 50,
            "overcommit_kbytes": 0,
            "admin_reserve_kbytes": 0,
            "user_reserve_kbytes": 0,
        }
        sizes = {"Committed_AS": 3 * MiB, "CommitLimit": 4 * MiB, "MemTotal": 8 * MiB}
        monkeypatch.setattr(proc, "vm_setting", settings.__getitem__)
        monkeypatch.setattr(proc, "meminfo_kib", lambda: {**sizes, "SwapTotal": 0})

        finding = only(check("overcommit"))

        assert finding.state == "limited"
        assert "at most 1 GiB more" in finding.allows
        assert 'mode="noreserve" is charged' in finding.allows
        assert "vm.overcommit_ratio=50" in finding.fact
        assert finding.change == "sysctl -w vm.overcommit_memory=0"

    @pytest.mark.parametrize(("mode", "words"), [(0, "refused above 8 GiB"), (1, "OOM killer")])
    def test_loose_overcommit(self, mode: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """In overcommit modes 0 and 1 the finding is good and names no change."""
        sizes = dict.fromkeys(("Committed_AS", "CommitLimit", "SwapTotal"), 0)
        monkeypatch.setattr(proc, "vm_setting", lambda name: mode)
        monkeypatch.setattr(proc, "meminfo_kib", lambda: {**sizes, "MemTotal": 8 * MiB})

        finding = only(check("overcommit"))

        assert (finding.state, finding.change) == ("good", None)
        assert words in finding.allows

    def test_map_entries_almost_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With few map entries left, the finding names the ranges left and the command."""
        monkeypatch.setattr(proc, "vm_setting", lambda name: 65530)
        monkeypatch.setattr(proc, "map_count", lambda: 65500)

        finding = diagnose().about("max_map_count")

        assert finding.state == "limited"
        assert "About 15 more" in finding.allows
        assert finding.change == "sysctl -w vm.max_map_count=262144"
        assert finding.effect == "About 98,322 more separate ranges can be committed."

    @pytest.mark.parametrize("version", [1, 2])
    def test_a_cgroup_limit(
        self, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The cgroup, v1 or v2, that leaves the least memory is named, with its command."""
        _, limit, use, cache = proc._CGROUPS[2 - version]
        for name, size in (("inner", 300 * MiB), ("outer", 200 * MiB)):
            (tmp_path / name).mkdir()
            (tmp_path / name / limit).write_text(f"{size}\n")
            (tmp_path / name / use).write_text(f"{100 * MiB}\n")
            (tmp_path / name / "memory.stat").write_text(f"{cache}{50 * MiB}\n")
        if version == 2:
            (tmp_path / "inner/memory.high").write_text(f"{150 * MiB}\n")
        groups = [
            proc.MemoryCgroup(str(tmp_path / name), limit, use, cache)
            for name in ("inner", "outer", "gone")
        ]
        monkeypatch.setattr(proc, "memory_cgroups", lambda: iter(groups))

        findings = {finding.topic: finding for finding in check("cgroup limit")}

        hard, file = findings["cgroup limit"], tmp_path / "outer" / limit
        assert hard.change == f"echo {'max' if version == 2 else -1} > {file}"
        assert "150 MiB more can be touched" in hard.allows
        assert hard.values == {"file": str(file), "limit": 200 * MiB, "used": 50 * MiB}
        assert ("cgroup high" in findings) == (version == 2)
        if version == 2:
            assert findings["cgroup high"].change == f"echo max > {tmp_path}/inner/memory.high"

    def test_no_cgroup_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An unlimited cgroup, v1 or v2, is good."""
        groups = []
        for (_, limit, use, cache), unlimited in zip(
            proc._CGROUPS, ("max", 2**63 - 4096), strict=True
        ):
            (tmp_path / limit).write_text(f"{unlimited}\n")
            groups.append(proc.MemoryCgroup(str(tmp_path), limit, use, cache))
        monkeypatch.setattr(proc, "memory_cgroups", lambda: iter(groups))

        assert only(check("cgroup limit")).state == "good"

    def test_locked_memory_without_the_capability(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """RLIMIT_MEMLOCK applies without CAP_IPC_LOCK."""
        monkeypatch.setattr(proc, "capable", lambda capability: False)
        monkeypatch.setattr(resource, "getrlimit", lambda which: (8 * MiB, 8 * MiB))

        finding = only(check("RLIMIT_MEMLOCK"))

        assert finding.state == "limited"
        assert "8 MiB" in finding.fact
        assert finding.change == "ulimit -l unlimited"

    @pytest.mark.parametrize(
        ("release", "seccomp", "fact", "change"),
        [
            ("5.10.0-amd64", "0", "does not have it", "boot Linux 6.10 or later"),
            ("6.18.1", "2", "seccomp filter", "seccomp profile"),
            ("6.18.1", "0", "since 6.10", "configured"),
        ],
    )
    def test_a_missing_feature(
        self,
        release: str,
        seccomp: str,
        fact: str,
        change: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A missing feature is attributed to an old kernel, a filter or the configuration."""
        monkeypatch.setattr(Feature, "works", lambda feature: feature.field != "mseal")
        monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
        monkeypatch.setattr(proc, "status", lambda: {"Seccomp": seccomp})

        (finding,) = [item for item in features.features() if item.topic == "mseal"]

        assert finding.state == "missing"
        assert fact in finding.fact
        assert change in str(finding.change)
        assert "reserve(seal=True) is refused" in finding.allows

    @pytest.mark.parametrize("own", ["never", "inherit"])
    def test_huge_pages_that_are_never_had(
        self, own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The command writes the switch that applies: that of the size, or the general one."""
        (tmp_path / "hugepages-2048kB").mkdir()
        (tmp_path / "hugepages-2048kB/enabled").write_text(
            " ".join(f"[{w}]" if w == own else w for w in ("always", "inherit", "madvise", "never"))
        )
        (tmp_path / "defrag").write_text("always [madvise] never")
        monkeypatch.setattr(machine, "THP", tmp_path)

        finding = pages._largest_thp("never", "never", 2 * MiB)

        switch = tmp_path / ("hugepages-2048kB/enabled" if own == "never" else "enabled")
        assert finding.state == "missing"
        assert finding.change == f"echo madvise > {switch}"

    @pytest.mark.parametrize("scope", [None, 0, 1, 2, 3])
    def test_yama(self, scope: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
        """No scope of Yama restricts reading mappings."""

        def setting(name: str) -> str:
            if scope is None:
                raise FileNotFoundError(name)
            return str(scope)

        monkeypatch.setattr(proc, "kernel_setting", setting)

        finding = only(surroundings.ptrace_scope())

        assert (finding.state, finding.values["ptrace_scope"]) == ("good", scope)

    def test_an_extra_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A missing extra names its missing packages and the pip command."""
        lines = ['no-such-thing>=1; extra == "plot"', 'rich>=13; extra == "cli"', "cffi>=1.17"]
        monkeypatch.setattr(surroundings, "requires", lambda name: lines)

        findings = {finding.topic: finding for finding in surroundings.extras()}

        assert findings["extra plot"].state == "missing"
        assert findings["extra plot"].change == "pip install 'pyreserve[plot]'"
        assert "no-such-thing" in findings["extra plot"].fact
        assert findings["extra cli"].state == "good"

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (PermissionError(13, "Permission denied", "/sys/x"), "/sys/x: Permission denied"),
            (KeyError("CommitLimit"), "does not report CommitLimit"),
            (ValueError("no number"), "no number"),
        ],
    )
    def test_a_check_that_fails(self, error: Exception, words: str) -> None:
        """A check that fails yields its earlier findings, then one that names the error."""
        first = Finding("a", "good", "It is so.", "All.")

        def check() -> Iterator[Finding]:
            yield first
            raise error

        findings = list(examine("b", check))

        assert findings[0] == first
        assert (findings[1].topic, findings[1].state) == ("b", "limited")
        assert words in findings[1].fact


def squeezed(text: str) -> str:
    """The text without spaces, line ends and backslashes."""
    return re.sub(r"[\s\\]", "", text)


class TestScreen:
    @pytest.fixture
    def shown(self, here: Diagnosis, capsys: pytest.CaptureFixture[str]) -> str:
        """The screen of the diagnosis, written to a pipe."""
        doctor_command.show(Screen(80), here)
        return capsys.readouterr().out

    def test_nothing_is_cut_at_80_columns(self, here: Diagnosis, shown: str) -> None:
        """The screen has all texts of all findings, in lines of at most 80 columns."""
        assert max(map(len, shown.splitlines())) <= 80
        text = squeezed(shown)
        for finding in here.findings:
            for words in (f"{finding.fact} {finding.allows}", finding.change, finding.effect):
                assert words is None or squeezed(words) in text

    def test_the_last_line_counts(self, here: Diagnosis, shown: str) -> None:
        """The last line counts the good, limited and missing findings."""
        counts = here.counts()

        assert shown.splitlines()[-1] == (
            f"{counts['good']} good, {counts['limited']} limited, {counts['missing']} missing"
        )

    def test_a_broken_command_is_the_same_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A shell reads a command that is broken over lines as the original one."""
        words = [f"word-{n}" for n in range(40)]
        finding = Finding("a", "limited", "It is.", "No.", f"echo {' '.join(words)}", "More.")
        doctor_command.show(Screen(80), Diagnosis(None, "6.1", "x86_64", "3.12", 1, (finding,)))
        out = capsys.readouterr().out

        command = re.search(r"^change(.*)^effect", out, re.MULTILINE | re.DOTALL)

        assert command is not None
        output = subprocess.run(
            ["sh", "-c", command[1]], capture_output=True, text=True, check=True
        ).stdout
        assert output.split() == words

    def test_the_command(self) -> None:
        """The command exits with 0, prints the counts, and no colours to a pipe."""
        done = run("true", arguments="")

        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(r"^\d+ good, \d+ limited, \d+ missing$", done.stdout, re.MULTILINE)
        assert "\x1b" not in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 80
