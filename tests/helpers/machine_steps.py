"""Runs the state machines of the containers that grow for many steps, and prints how many.

``python -m helpers.machine_steps [STEPS]``, in tests/; by default 100,000 steps in all.
"""

import importlib
import sys
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis.stateful import invariant, run_state_machine_as_test

MACHINES = {
    "alloc.test_growable_machine": "GrowableMachine",
    "alloc.test_growable_list_machine": "ListMachine",
    "alloc.test_growable_file_machine": "FileMachine",
    "alloc.test_ring_machine": "RingMachine",
}
STEPS_EACH = 50  # of one example
EXAMPLES = settings(
    max_examples=50,
    stateful_step_count=STEPS_EACH,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def drive(machine: Any, steps: int) -> int:
    """Run a state machine until it has made at least `steps` steps; return their number."""
    made = 0

    class Counted(machine):  # type: ignore[misc]
        """The same machine; an invariant is checked once after each step."""

        def __init__(self) -> None:
            nonlocal made
            super().__init__()
            made -= 1  # the invariants are checked before the first step too

        @invariant()
        def count(self) -> None:
            nonlocal made
            made += 1

    while made < steps:
        run_state_machine_as_test(Counted, settings=EXAMPLES)
    return made


def main() -> None:
    """Share the steps out evenly."""
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    total = 0
    for module, name in MACHINES.items():
        made = drive(getattr(importlib.import_module(module), name), -(-wanted // len(MACHINES)))
        print(f"{name}: {made:,} steps", flush=True)
        total += made
    print(f"in all: {total:,} steps, no difference from the models")


if __name__ == "__main__":
    main()
