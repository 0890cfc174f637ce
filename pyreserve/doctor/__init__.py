"""What this machine and this process allow pyreserve to do, in words, and what would change it.

    diagnosis = diagnose()
    print(diagnosis.about("max_map_count").change)  # sysctl -w vm.max_map_count=262144

Nothing is changed, and nothing is printed.
"""

import os
import platform

from pyreserve._system.extras import own_version
from pyreserve.doctor import addresses, features, memory, pages, surroundings
from pyreserve.doctor.findings import SCHEMA, STATES, Diagnosis, Finding, State, examine

__all__ = ["SCHEMA", "STATES", "Diagnosis", "Finding", "State", "diagnose"]

_ROOMS = (addresses, memory, pages, features, surroundings)


def diagnose() -> Diagnosis:
    """Look at this process and the machine it is on, and say what limits it first.

    What can't be read, as /sys in some containers, is a finding that says so; nothing is raised for
    it. Takes some milliseconds.
    """
    findings = [
        finding
        for room in _ROOMS
        for topic, check in room.CHECKS
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
