"""Checks of limits, from the table in `pyreserve._system.limits`."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from pyreserve import layouts
from pyreserve._system.limitbase import Limit
from pyreserve._system.limits import LIMITS
from pyreserve._system.rlimits import RLIMIT_AS
from pyreserve.doctor.findings import Finding
from pyreserve.units import WORD


def findings(limit: Limit) -> Iterator[Finding]:
    """Check one limit of the table."""
    for assessment in limit.assess():
        finding = Finding.of(assessment)
        if limit is RLIMIT_AS and finding.state == "limited" and _falls_back(**finding.values):
            consequence = "pyreserve vsz falls back to a smaller layout."
            finding = replace(finding, allows=f"{finding.allows.rstrip('.')}; {consequence}")
        yield finding


def _falls_back(limit: int, used: int) -> bool:
    return limit - used < layouts.get(layouts.default_name(WORD)).total()


CHECKS = tuple((limit.topic or limit.name, partial(findings, limit)) for limit in LIMITS)
