"""The policies of a region: their names in Python and their flags in C."""

from typing import Literal

from pyreserve._native import lib
from pyreserve._system import proc

Mode = Literal["charge", "noreserve"]
Fork = Literal["copy", "wipe"]
HugePages = Literal["default", "prefer", "never"]
RegionFork = Literal["copy", "wipe", "share"]

_MODES = {"charge": 0, "noreserve": lib.VM_NORESERVE}
_FORKS = {"copy": 0, "wipe": lib.VM_WIPE_ON_FORK}
_HUGE = {"default": 0, "prefer": lib.VM_HUGE_PREFER, "never": lib.VM_HUGE_NEVER}
POLICIES = {
    (mode, fork, huge, no_dump): (
        accounting,
        fork_flag | huge_flag | (lib.VM_NO_DUMP if no_dump else 0),
    )
    for mode, accounting in _MODES.items()
    for fork, fork_flag in _FORKS.items()
    for huge, huge_flag in _HUGE.items()
    for no_dump in (False, True)
}


def effective_mode(mode: Mode) -> tuple[Mode, int]:
    """Return the mode that takes effect, and its accounting flag of ``csrc/region.h``.

    If /proc is unreadable, vm.overcommit_memory counts as 0, the kernel's default.

    Raises:
        ValueError: `mode` is not a mode.
    """
    if mode not in _MODES:
        raise unknown_word(mode, "copy", "default")
    if mode == "noreserve" and is_strict():
        mode = "charge"
    return mode, _MODES[mode]


def check_shared(mode: Mode, fork: Fork) -> None:
    """Check the policies of a shared region.

    Raises:
        ValueError: they need private memory.
    """
    for argument, value in (("mode", "noreserve"), ("fork", "wipe")):
        if value in (mode, fork):  # they may be unhashable
            msg = f"{argument} must not be {value!r} with shared=True: that needs private memory"
            raise ValueError(msg)


def is_strict() -> bool:
    """Return whether vm.overcommit_memory is 2: every page is charged, shared ones too."""
    return proc.setting_or_default("overcommit_memory") == 2


def unknown_word(mode: object, fork: object, huge_pages: object) -> ValueError:
    """Create the exception for the policy that has no such value."""
    for argument, value, words in (("mode", mode, _MODES), ("fork", fork, _FORKS)):
        if value not in list(words):
            return ValueError(f"{argument} must be one of {', '.join(words)}, got {value!r}")
    return ValueError(f"huge_pages must be one of {', '.join(_HUGE)}, got {huge_pages!r}")
