"""Measure what the verbs of virtual memory cost on this machine.

- `plan` chooses which cells to measure, `measure` measures them and returns a `CostTable`.
- `CostTable.model` fits a `CostModel`, which estimates the cost of any length.
- `measure_bystanders` measures what one thread's calls cost the other threads.
- `recommend` derives recommendations from a table, `compare` finds changes between two tables.

    table = measure(plan(only=["commit", "touch"]), budget=10)
    table.model().estimate("touch", pages=1000)  # nanoseconds
"""

from pyreserve.costs.bystander_table import (
    BystanderCost,
    BystanderTable,
    FaultCost,
    Figure,
    ReaderCost,
)
from pyreserve.costs.bystanders import (
    BYSTANDERS_BUDGET,
    BystandersInterrupted,
    measure_bystanders,
)
from pyreserve.costs.cells import GROUPS, METHODS, Cell, Curve
from pyreserve.costs.comparison import Compared, Comparison, compare
from pyreserve.costs.measuring import BUDGET, Interrupted, Progress, measure
from pyreserve.costs.model import CostModel, Estimate, Fit
from pyreserve.costs.planning import Plan, plan
from pyreserve.costs.recommendation import Answer, Recommendations, measured_step, recommend
from pyreserve.costs.results import Measured, Noise
from pyreserve.costs.stats import Times
from pyreserve.costs.table import CostTable

__all__ = [
    "BUDGET",
    "BYSTANDERS_BUDGET",
    "GROUPS",
    "METHODS",
    "Answer",
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
    "Measured",
    "Noise",
    "Plan",
    "Progress",
    "ReaderCost",
    "Recommendations",
    "Times",
    "compare",
    "measure",
    "measure_bystanders",
    "measured_step",
    "plan",
    "recommend",
]
