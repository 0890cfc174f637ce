"""Measure what the verbs of virtual memory cost on this machine.

- `plan` chooses which cells to measure, `measure` measures them and returns a `CostTable`.
- `CostTable.model` fits a `CostModel`, which estimates the cost of any length.
- `faults` says what the page faults of a block of code cost, and what huge pages would save.
- `measure_bystanders` measures what one thread's calls cost the other threads.
- `recommend` derives verdicts from a table, `compare` finds changes between two tables,
  `side_by_side` shows where machines differ.
- `pyreserve.costs.cluster` measures on the hosts of a Dask cluster.

    table = measure(plan(only=["commit", "touch"]), budget=10)
    table.model().estimate("touch", pages=1000)  # nanoseconds
"""

from pyreserve.costs.bystander_table import (
    BystanderCost,
    BystanderTable,
    FaultCost,
    ReaderCost,
)
from pyreserve.costs.bystanders import (
    BYSTANDERS_BUDGET,
    BystandersInterrupted,
    measure_bystanders,
)
from pyreserve.costs.cells import GROUPS, METHODS, OPERATIONS, Cell, Curve, Operation
from pyreserve.costs.comparison import Compared, Comparison, compare
from pyreserve.costs.faulting import faults
from pyreserve.costs.faultmodel import Figure
from pyreserve.costs.machines import Machines, Row, Spread, side_by_side
from pyreserve.costs.measuring import BUDGET, Interrupted, Progress, measure
from pyreserve.costs.model import CostModel, Estimate, Fit
from pyreserve.costs.planning import Plan, plan
from pyreserve.costs.recommendation import Recommendations, Verdict, measured_step, recommend
from pyreserve.costs.results import Measured, Noise
from pyreserve.costs.stats import ENOUGH, Interval, Times
from pyreserve.costs.table import CostTable
from pyreserve.costs.ways import SITUATIONS, WAYS, Situation, Way, WayCosts

__all__ = [
    "BUDGET",
    "BYSTANDERS_BUDGET",
    "ENOUGH",
    "GROUPS",
    "METHODS",
    "OPERATIONS",
    "SITUATIONS",
    "WAYS",
    "BystanderCost",
    "BystanderTable",
    "BystandersInterrupted",
    "Cell",
    "Compared",
    "Comparison",
    "CostModel",
    "CostTable",
    "Curve",
    "Estimate",
    "FaultCost",
    "Figure",
    "Fit",
    "Interrupted",
    "Interval",
    "Machines",
    "Measured",
    "Noise",
    "Operation",
    "Plan",
    "Progress",
    "ReaderCost",
    "Recommendations",
    "Row",
    "Situation",
    "Spread",
    "Times",
    "Verdict",
    "Way",
    "WayCosts",
    "compare",
    "faults",
    "measure",
    "measure_bystanders",
    "measured_step",
    "plan",
    "recommend",
    "side_by_side",
]
