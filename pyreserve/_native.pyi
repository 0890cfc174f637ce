# The extension module that cffi builds from csrc/*.h. It is untyped: each Python module that
# calls it annotates the results.
from typing import Any

ffi: Any
lib: Any
