"""Builds pyreserve._native. The C headers are the only declarations: the cdef is made from them."""

import re
from pathlib import Path

from cffi import FFI

MODULES = (
    "vm",
    "sys",
    "runs",
    "bitmap",
    "tracing",
    "shared",
    "region",
    "lazybitmap",
    "pagealloc",
    "heap",
    "timing",
    "faultlog",
    "bystanders",
    "procmaps",
    "forklocks",
)  # lowest first
PRIVATE = (
    "bystanders_stage",
    "pagealloc_scan",
    "words",
)  # headers of C alone, which Python does not see
HERE = Path("csrc")  # setuptools wants paths relative to setup.py, and runs this from there


def declarations(header: Path) -> str:
    """A header without its preprocessor lines: the subset of C that cffi reads."""
    return re.sub(r"^#.*$", "", header.read_text(encoding="utf-8"), flags=re.MULTILINE)


ffibuilder = FFI()
ffibuilder.cdef("\n".join(declarations(HERE / f"{module}.h") for module in MODULES))
ffibuilder.set_source(
    "pyreserve._native",
    "\n".join(f'#include "{module}.h"' for module in MODULES),
    sources=[str(HERE / f"{module}.c") for module in MODULES],
    depends=[str(HERE / f"{header}.h") for header in (*MODULES, *PRIVATE)],
    include_dirs=[str(HERE)],
    libraries=["dl"],  # dlsym, which glibc before 2.34 has there
    extra_compile_args=["-std=c11", "-O3", "-fvisibility=hidden"],
)
