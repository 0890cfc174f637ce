"""Sphinx's settings."""

from importlib.metadata import version as _version

project = "pyreserve"
author = "the pyreserve developers"
project_copyright = "the pyreserve developers"
release = version = _version("pyreserve")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
highlight_language = "none"  # a block without a language is an illustration
default_role = "py:obj"  # `name` in docstrings

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "inherited-members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "pyreserve"
