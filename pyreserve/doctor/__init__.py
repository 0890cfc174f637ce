"""Checks of this machine and process: what limits pyreserve, and which command changes it.

    diagnosis = diagnose()
    print(diagnosis.about("max_map_count").change)  # sysctl -w vm.max_map_count=262144

The checks change nothing and print nothing.
"""

import os
import platform

from pyreserve._system.extras import own_version
from pyreserve.doctor import features, limits, pages, surroundings
from pyreserve.doctor.findings import SCHEMA, STATES, Diagnosis, Finding, State, examine

__all__ = ["SCHEMA", "STATES", "Diagnosis", "Finding", "State", "diagnose"]

_MODULES = (limits, pages, features, surroundings)


def diagnose() -> Diagnosis:
    """Check this process and its machine. Findings that limit come first.

    A file that can't be read, such as /sys in some containers, yields a finding instead of an
    exception. Takes some milliseconds.
    """
    findings = [
        finding
        for module in _MODULES
        for topic, check in module.CHECKS
        for finding in examine(topic, check)
    ]
    findings.sort(key=lambda finding: STATES.index(finding.state))
    return Diagnosis(
        pyreserve=own_version(),
        kernel=platform.release(),
        machine=platform.machine(),
        python=platform.python_version(),
        pid=os.getpid(),
        findings=tuple(findings),
    )
