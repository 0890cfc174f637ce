"""Runs every state machine for many steps, and prints a table of the steps and seconds of each.

``python -m helpers.machine_steps [STEPS] [MACHINE...]``, in tests/; by default 100,000 steps in
all, shared by all machines of the files test_*_machine.py.
"""

import importlib
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    run_state_machine_as_test,
)

TESTS = Path(__file__).resolve().parents[1]
STEPS_EACH = 50  # of one example
EXAMPLES = settings(
    max_examples=50,
    stateful_step_count=STEPS_EACH,
    deadline=None,
    database=None,
    derandomize=False,  # each round of examples differs from the last
    suppress_health_check=list(HealthCheck),
)
ROW = "{:<22} {:>10} {:>10}  {}"


def machines() -> dict[str, type[RuleBasedStateMachine]]:
    """Return the state machines of all tests, by name."""
    found: dict[str, type[RuleBasedStateMachine]] = {}
    for path in sorted(TESTS.glob("*/test_*_machine.py")):
        module = importlib.import_module(f"{path.parent.name}.{path.stem}")
        found |= {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, type)
            and issubclass(value, RuleBasedStateMachine)
            and value.__module__ == module.__name__
        }
    return found


class Drive:
    """Runs a state machine until it has made at least `steps` steps, and counts them."""

    def __init__(self, machine: Any) -> None:
        self.steps = 0
        drive = self

        class Counted(machine):  # type: ignore[misc]
            """The same machine; an invariant is checked once after each step."""

            def __init__(self) -> None:
                super().__init__()
                drive.steps -= 1  # the invariants are checked before the first step too

            @invariant()
            def count(self) -> None:
                drive.steps += 1

        self._machine = Counted

    def run(self, steps: int) -> bool:
        """Return whether the machine never differed from its model; print a difference."""
        try:
            while self.steps < steps:
                run_state_machine_as_test(self._machine, settings=EXAMPLES)
        except Exception:
            traceback.print_exc()
            return False
        return True


def main() -> None:
    """Share the steps out evenly.

    Raises:
        SystemExit: a machine differs from its model, or no machine has a name that was passed.
    """
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    known = machines()
    if unknown := [name for name in sys.argv[2:] if name not in known]:
        sys.exit(f"no such machine: {', '.join(unknown)}; there are {', '.join(known)}")
    names = sys.argv[2:] or list(known)
    total, began, differing = 0, time.perf_counter(), []
    print(ROW.format("machine", "steps", "seconds", ""), flush=True)
    for name in names:
        start, drive = time.perf_counter(), Drive(known[name])
        if not drive.run(-(-wanted // len(names))):
            differing.append(name)
        note = "differs from its model" if name in differing else ""
        seconds = f"{time.perf_counter() - start:,.1f}"
        print(ROW.format(name, f"{drive.steps:,}", seconds, note).rstrip(), flush=True)
        total += drive.steps
    seconds = f"{time.perf_counter() - began:,.1f}"
    print(ROW.format("in all", f"{total:,}", seconds, "").rstrip())
    print(f"different from their models: {', '.join(differing) or 'none'}")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
