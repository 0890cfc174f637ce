"""Measuring on a Dask cluster: a real scheduler and two workers on loopback."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.subjects import wait_until
from helpers.witness import PATIENCE
from pyreserve import PAGE_SIZE
from pyreserve.costs import cluster, plan

HAS_DASK = find_spec("distributed") is not None

OPTIONS: dict[str, Any] = {"details": True, "only": ["reserve"], "longest": PAGE_SIZE}

# A process of its own: a client leaves threads behind. Prints each outcome as it arrives.
CLIENT = f"""
import faulthandler, json, sys
from distributed import Client
from pyreserve.costs import cluster
faulthandler.dump_traceback_later({PATIENCE / 2}, exit=True)

def show(name, outcome):
    document = outcome if isinstance(outcome, str) else outcome.to_dict()
    print(json.dumps([name, document]), flush=True)

scheduler, arguments = json.loads(sys.argv[1])
with Client(scheduler_file=scheduler, timeout={PATIENCE}, set_as_default=False) as client:
    client.wait_for_workers(2, timeout={PATIENCE})
    costs = cluster.measure(client, progress=show, **arguments)
    print(json.dumps([sorted(costs.tables), costs.failures]))
"""


class Cluster:
    """A scheduler and two workers, each a process, whose hosts are 127.0.0.1 and 127.0.0.2."""

    def __init__(self, folder: Path, hosts: tuple[str, str]) -> None:
        self.file = folder / "scheduler.json"
        self._log = (folder / "log").open("wb")
        self._folder = folder
        quiet = ("--no-dashboard", "--scheduler-file", str(self.file))
        self.scheduler = self._start("scheduler", "--host", hosts[0], "--port", "0", *quiet)
        wait_until(lambda: self.file.exists() and self.file.stat().st_size > 0, "the scheduler")
        self.workers = [
            self._start("worker", "--host", host, "--no-nanny", "--nthreads", "1", *quiet)
            for host in hosts
        ]

    def _start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "dask", *arguments]
        return subprocess.Popen(command, stdout=self._log, stderr=self._log, cwd=self._folder)

    def measure(self, **arguments: Any) -> "subprocess.Popen[str]":
        """Start a client that measures few cells."""
        arguments = {"budget": 1.5, **OPTIONS, **arguments}
        document = json.dumps([str(self.file), arguments])
        command = [sys.executable, "-c", CLIENT, document]
        pipe = subprocess.PIPE
        self._client = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
        return self._client

    def close(self) -> None:
        """Kill all processes."""
        processes: tuple[subprocess.Popen[Any], ...] = (*self.workers, self.scheduler, self._client)
        for process in processes:
            process.kill()
            process.wait()
        self._log.close()


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster whose workers are on two hosts."""
    running = Cluster(tmp_path, ("127.0.0.1", "127.0.0.2"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def one_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose workers are on the same host."""
    running = Cluster(tmp_path_factory.mktemp("cluster"), ("127.0.0.1", "127.0.0.1"))
    yield running
    running.close()


def answers(client: "subprocess.Popen[str]") -> tuple[dict[str, Any], list[Any]]:
    """The outcomes that arrived at a client, by name, and its result."""
    out, err = client.communicate(timeout=PATIENCE)
    assert client.returncode == 0, err
    *arrived, result = map(json.loads, out.splitlines())
    return dict(arrived), result


def measured(outcome: dict[str, Any]) -> int:
    """The number of measured cells of a complete table."""
    assert outcome["complete"]
    return sum(cell["ns"] is not None for cell in outcome["cells"])


def is_measuring(worker: "subprocess.Popen[bytes]") -> bool:
    """Whether a worker has a measuring child."""
    return bool(psutil.Process(worker.pid).children())


@pytest.mark.skipif(not HAS_DASK, reason="Dask (extra dask) is not installed")
class TestCluster:
    def test_a_worker_that_is_killed(self, two_hosts: Cluster) -> None:
        """The loss of a worker is named, and the other's table is whole."""
        client = two_hosts.measure()
        wait_until(lambda: all(map(is_measuring, two_hosts.workers)), "both workers to measure")

        two_hosts.workers[1].kill()

        arrived, result = answers(client)
        assert result == [["127.0.0.1"], {"127.0.0.2": "the worker left the cluster"}]
        assert arrived["127.0.0.2"] == "the worker left the cluster"
        assert measured(arrived["127.0.0.1"]) == len(plan(**OPTIONS).cells)

    def test_a_host_measures_once(self, one_host: Cluster) -> None:
        """Of two workers of a host, one measures."""
        arrived, result = answers(one_host.measure())

        assert result == [["127.0.0.1"], {}]
        assert measured(arrived["127.0.0.1"]) > 0

    def test_each_worker_of_a_host(self, one_host: Cluster) -> None:
        """With per_worker both workers of a host measure, one after the other."""
        together = False
        client = one_host.measure(per_worker=True)
        while client.poll() is None:
            together |= all(map(is_measuring, one_host.workers))
            time.sleep(0.05)

        arrived, result = answers(client)
        assert not together
        assert result == [sorted(arrived), {}]
        assert [name.rpartition(":")[0] for name in arrived] == ["tcp://127.0.0.1"] * 2
        assert all(measured(outcome) > 0 for outcome in arrived.values())

    def test_a_worker_that_fails(self, one_host: Cluster) -> None:
        """The error of a measurement is the reason of its failure; the next worker goes on."""
        arrived, result = answers(one_host.measure(budget=-1.0, per_worker=True))

        reason = "ValueError: budget must be positive and finite, got -1.0"
        assert result == [[], dict.fromkeys(sorted(arrived), reason)]
        assert len(arrived) == 2


class TestWithoutACluster:
    def test_dask_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without Dask the error names the extra."""
        monkeypatch.setitem(sys.modules, "distributed", None)

        with pytest.raises(ImportError, match=r"pip install 'pyreserve\[dask\]'"):
            cluster.measure(object())  # type: ignore[arg-type]

    def test_a_wrong_option(self) -> None:
        """A wrong option of the plan is refused before the cluster is asked."""
        with pytest.raises(ValueError, match="unknown verb 'toch'"):
            cluster.measure(object(), only=["toch"])  # type: ignore[arg-type]
