"""Facts about the machine that determine the cost of its memory."""

import os
import platform
from pathlib import Path
from typing import Any

from pyreserve._system import proc
from pyreserve._system.extras import own_version
from pyreserve._system.features import chosen, hugetlb_free, thp_settings
from pyreserve._system.limits import PAGE_SIZE

_SYS = Path("/sys")


def facts() -> dict[str, Any]:
    """Return the facts as a JSON-compatible dict; sizes in bytes, None if unknown.

    A vm setting that is unreadable has the kernel's default.

    - ``cpu``, ``cpus`` (the CPUs that this process may use), ``architecture``, ``kernel``;
    - ``memory``, ``page_size``, ``overcommit_memory`` (vm.overcommit_memory), ``max_map_count``;
    - ``transparent_huge_pages`` (size: setting), ``transparent_huge_pages_defrag``,
      ``hugetlb_free`` (size: free pages);
    - ``virtualised``: the hypervisor's name, ``"yes"`` if it has none, ``"no"`` on bare metal;
    - ``balloon``: whether a virtio balloon device may reclaim idle memory;
    - ``clocksource``, ``python``, ``pyreserve``.
    """
    cpu = _cpu_info()
    return {
        "cpu": cpu.get("model name") or cpu.get("Model") or platform.processor() or None,
        "cpus": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "memory": _memory(),
        "page_size": PAGE_SIZE,
        "overcommit_memory": proc.setting_or_default("overcommit_memory"),
        "max_map_count": proc.setting_or_default("max_map_count"),
        "transparent_huge_pages": {str(size): setting for size, setting in thp_settings().items()},
        "transparent_huge_pages_defrag": chosen(_SYS / "kernel/mm/transparent_hugepage/defrag"),
        "hugetlb_free": {str(size): free for size, free in hugetlb_free().items()},
        "virtualised": _virtualised(cpu.get("flags", "")),
        "balloon": any((_SYS / "bus/virtio/drivers/virtio_balloon").glob("virtio*")),
        "clocksource": _text("devices/system/clocksource/clocksource0/current_clocksource"),
        "python": platform.python_version(),
        "pyreserve": own_version(),
    }


def _memory() -> int:
    try:
        return proc.meminfo_kib()["MemTotal"] * 1024
    except proc.UNREADABLE:
        return os.sysconf("SC_PHYS_PAGES") * PAGE_SIZE


def _cpu_info() -> dict[str, str]:
    """Return the first processor of /proc/cpuinfo; empty if unreadable."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _virtualised(flags: str) -> str:
    name = _text("hypervisor/type") or _text("class/dmi/id/sys_vendor")
    if "hypervisor" not in flags.split() and _text("hypervisor/type") is None:
        return "no"
    return name or "yes"


def _text(path: str) -> str | None:
    try:
        return (_SYS / path).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
