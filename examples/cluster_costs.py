"""Measure memory costs on every host of a Dask cluster, and show where the hosts differ.

Without an address it starts two workers on this machine, and measures on each for two seconds.

    python examples/cluster_costs.py tcp://scheduler:8786
"""

import sys

from distributed import Client

from pyreserve.costs import CostTable, cluster, side_by_side


def report(name: str, outcome: CostTable | str) -> None:
    """Print a line for a host as it ends."""
    if isinstance(outcome, CostTable):
        outcome = f"{len(list(outcome.measured()))} cells in {outcome.seconds:.1f} s"
    print(f"{name}: {outcome}", flush=True)


def main() -> None:
    """Measure, and compare the tables that arrived."""
    if len(sys.argv) > 1:
        client, local = Client(sys.argv[1]), False
    else:
        client, local = Client(n_workers=2, threads_per_worker=1, dashboard_address=":0"), True
    with client:
        costs = cluster.measure(
            client,
            only=["commit", "touch"],
            longest="64KiB" if local else "16MiB",
            budget=2 if local else 20,
            per_worker=local,
            progress=report,
        )
    if len(costs.tables) > 1:
        print(side_by_side(costs.tables))


if __name__ == "__main__":
    main()
