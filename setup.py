"""The part of the build that pyproject.toml has no words for; everything else is there."""

import sysconfig

from setuptools import setup
from setuptools.command.build_ext import build_ext

# cffi makes an extension for the stable ABI except on free-threaded interpreters.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


class BuildExt(build_ext):
    """Builds the extension, and leaves a copy beside its sources.

    Python started in a clone imports that copy, even if another one is installed.
    """

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if not self.inplace:
            self.copy_extensions_to_source()


setup(
    cffi_modules=["csrc/build_native.py:ffibuilder"],
    cmdclass={"build_ext": BuildExt},
    options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
