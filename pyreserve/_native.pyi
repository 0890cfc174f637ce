# What cffi builds from csrc/*.h. The headers are the declarations; each call is typed by the
# Python face around it.
from typing import Any

ffi: Any
lib: Any
