"""Measure what the verbs of virtual memory cost on this machine.

- `plan` chooses which cells to measure, `measure` measures them and returns a `CostTable`.
- `CostTable.model` fits a `CostModel`, which estimates the cost of any length.
- `recommend` derives recommendations from a table, `compare` finds changes between two tables,
  `side_by_side` shows where machines differ.
- `pyreserve.costs.cluster` measures on the hosts of a Dask cluster.

    table = measure(plan(only=["commit", "touch"]), budget=10)
    table.model().estimate("touch", pages=1000)  # nanoseconds
"""

from pyreserve.costs.cells import GROUPS, METHODS, Cell, Curve
from pyreserve.costs.comparison import Compared, Comparison, compare
from pyreserve.costs.machines import Machines, side_by_side
from pyreserve.costs.measuring import BUDGET, Interrupted, Progress, measure
from pyreserve.costs.model import CostModel, Estimate, Fit
from pyreserve.costs.planning import Plan, plan
from pyreserve.costs.recommendation import Answer, Recommendations, measured_step, recommend
from pyreserve.costs.results import Measured, Noise
from pyreserve.costs.stats import Times
from pyreserve.costs.table import CostTable

__all__ = [
    "BUDGET",
    "GROUPS",
    "METHODS",
    "Answer",
    "Cell",
    "Compared",
    "Comparison",
    "CostModel",
    "CostTable",
    "Curve",
    "Estimate",
    "Fit",
    "Interrupted",
    "Machines",
    "Measured",
    "Noise",
    "Plan",
    "Progress",
    "Recommendations",
    "Times",
    "compare",
    "measure",
    "measured_step",
    "plan",
    "recommend",
    "side_by_side",
]
