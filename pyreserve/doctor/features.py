"""Checks of kernel features, from the table in `pyreserve._system.features`."""

from collections.abc import Iterator

from pyreserve._system.features import FEATURES
from pyreserve.doctor.findings import Finding


def features() -> Iterator[Finding]:
    """Check for each feature whether it works here, and if not, why."""
    for feature in FEATURES:
        yield Finding.of(feature.assess())


CHECKS = (("kernel features", features),)
