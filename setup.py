"""The part of the build that pyproject.toml has no words for; everything else is there."""

import sysconfig

from setuptools import setup

# cffi makes an extension for the stable ABI except on free-threaded interpreters.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

setup(
    cffi_modules=["csrc/build_native.py:ffibuilder"],
    options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
