"""Measure on the hosts of a running Dask cluster. Needs the extra ``dask``."""

import time
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any, NamedTuple

from pyreserve._system.extras import import_extra
from pyreserve.costs.measuring import BUDGET
from pyreserve.costs.planning import plan
from pyreserve.costs.table import CostTable

if TYPE_CHECKING:
    from distributed import Client, Future

_POLL = 0.2  # seconds between two looks at the cluster
_TRANSFER = 30.0  # seconds to wait for the table of a measurement that has ended


class ClusterCosts(NamedTuple):
    """The result of `measure`; the keys are addresses of hosts, with `per_worker` of workers.

    Attributes:
        tables: the measured costs.
        failures: why a host or worker has no table.
    """

    tables: dict[str, CostTable]
    failures: dict[str, str]


def measure(
    client: "Client",
    *,
    budget: float = BUDGET,
    per_worker: bool = False,
    progress: Callable[[str, CostTable | str], object] | None = None,
    **options: Any,
) -> ClusterCosts:
    """Measure on every host of a Dask cluster, on one worker of each.

    All hosts measure at the same time. A host that fails or leaves is among the failures, the
    others go on; a measurement is never moved to another worker. After an exception or Ctrl-C no
    measurement starts any more.

    Args:
        client: a client, not an asynchronous one. The workers must have pyreserve; one that is
            busy measures after its tasks.
        budget: limit of a measurement, in seconds.
        per_worker: measure on all workers, of each host one after the other.
        progress: called for each host or worker that ends, with its address and its table, or the
            reason of its failure.
        options: for `pyreserve.costs.plan`, which each worker calls for its own machine.

    Raises:
        ImportError: Dask is not installed (extra ``dask``).
        ValueError: an option is not valid.
        OSError: the scheduler cannot be reached; `progress` has had what arrived before.
    """
    plan(**options)  # refuse wrong options before anything is measured
    distributed = import_extra("distributed", "dask", "pyreserve.costs.cluster")
    task, costs = _task(budget, options), ClusterCosts({}, {})
    queues: dict[str, list[str]] = {}
    for address in client.nthreads():
        queues.setdefault(distributed.comm.get_address_host(address), []).append(address)
    if not per_worker:
        queues = {host: workers[:1] for host, workers in queues.items()}
    running: dict[str, tuple[str, Future[str]]] = {}
    try:
        while running or any(queues.values()):
            for host, queue in queues.items():
                if queue and host not in running:
                    address = queue.pop(0)
                    future = client.submit(task, workers=[address], retries=0, pure=False)
                    running[host] = address, future
            time.sleep(_POLL)
            workers = client.nthreads()
            for host, (address, future) in list(running.items()):
                outcome = _outcome(address, future, workers)
                if outcome is not None:
                    del running[host]
                    name = address if per_worker else host
                    if isinstance(outcome, str):
                        costs.failures[name] = outcome
                    else:
                        costs.tables[name] = outcome
                    if progress is not None:
                        progress(name, outcome)
                    future.cancel()  # a worker that returns to this address must not repeat it
    finally:
        client.cancel([future for _, future in running.values()])
    return costs


def _task(budget: float, options: dict[str, Any]) -> Callable[[], str]:
    """Return what workers run. A local function is pickled whole: the scheduler imports nothing."""

    def measure_costs() -> str:
        from pyreserve import costs  # noqa: PLC0415

        return costs.measure(costs.plan(**options), budget=budget).to_json()

    return measure_costs


def _outcome(
    address: str, future: "Future[str]", workers: Container[str]
) -> CostTable | str | None:
    """Return a table, or the reason of a failure; None if the worker is still measuring."""
    if not future.done():
        # Its task would never end: no other worker may run it.
        return None if address in workers else "the worker left the cluster"
    if future.cancelled():
        return "the measurement was cancelled"
    try:
        return CostTable.from_json(future.result(_TRANSFER))
    except Exception as error:  # whatever happened on the worker
        return f"{type(error).__name__}: {error}"
