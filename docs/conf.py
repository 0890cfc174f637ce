"""Sphinx's settings."""

from __future__ import annotations

from importlib.metadata import version as _version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

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
napoleon_custom_sections = [("All methods raise", "params_style")]

html_theme = "furo"
html_title = "pyreserve"


def _reword_sections(
    _app: Sphinx, _kind: str, _name: str, _object: object, _options: object, lines: list[str]
) -> None:
    """Spell a section as napoleon can read it: its titles have no parentheses."""
    lines[:] = [line.replace("Raises (all methods):", "All methods raise:") for line in lines]


def setup(app: Sphinx) -> None:
    """Connect this project's handlers, before napoleon's."""
    app.connect("autodoc-process-docstring", _reword_sections, priority=400)
