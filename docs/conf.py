"""Sphinx's settings."""

from __future__ import annotations

import re
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from docutils.nodes import image

from pyreserve.layouts import Piece

if TYPE_CHECKING:
    from docutils.nodes import document
    from sphinx.application import Sphinx

project = "pyreserve"
author = "The pyreserve authors"
project_copyright = "The pyreserve authors"
release = version = _version("pyreserve")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
highlight_language = "none"  # a block without a language is an illustration
default_role = "py:obj"  # `name` in docstrings
suppress_warnings = ["ref.python"]  # array[int] in a signature matches every attribute `array`

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
autodoc_default_options = {"members": True, "inherited-members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("All methods raise", "params_style")]

html_theme = "furo"
html_title = "pyreserve"
html_static_path = ["_static"]
html_css_files = ["tables.css"]


def _short(types: str) -> str:
    """Spell LayoutName, not its values, and classes without their modules."""
    types = re.sub(r"(~?typing\.)?Literal\['go-tip[^\]]*\]", "LayoutName", types)
    return re.sub(r"(?<!~)\bpyreserve(\.\w+)+", r"~\g<0>", types)


# napoleon reads "text: text" in a property's first line as a type and its description.
_COLON = "\ue000"


def _before_napoleon(
    _app: Sphinx, kind: str, _name: str, _object: object, _options: object, lines: list[str]
) -> None:
    """Spell section titles without parentheses, and hide colons that are no sections'."""
    lines[:] = [line.replace("Raises (all methods):", "All methods raise:") for line in lines]
    if kind in {"attribute", "data", "property"} and lines:
        lines[0] = lines[0].replace(":", _COLON)


def _after_napoleon(
    _app: Sphinx, _kind: str, _name: str, _object: object, _options: object, lines: list[str]
) -> None:
    lines[:] = [line.replace(_COLON, ":") for line in lines]
    for i, line in enumerate(lines):
        if line.startswith(":ivar "):  # Sphinx takes "start" of "start, end" for a type
            names, colon, text = line.removeprefix(":ivar ").partition(":")
            lines[i] = f":ivar {names.replace(' ', '')}{colon}{text}"
        elif line.startswith(":vartype "):
            lines[i] = _short(line)


# Made by functions of the package, never by a user's call. Named tuples whose docstring does not
# list their fields keep the signature, which does.
_NOT_CONSTRUCTED = {
    f"pyreserve.{name}"
    for name in (
        "AddressSpace",
        "Block",
        "Blocks",
        "Capabilities",
        "HeapBitmap",
        "MemStats",
        "Region",
        "Scavenger",
        "_region.exports.Exports",
        "costs.Verdict",
        "costs.BystanderCost",
        "costs.BystanderTable",
        "costs.FaultCost",
        "costs.ReaderCost",
        "costs.Compared",
        "costs.Comparison",
        "costs.CostModel",
        "costs.CostTable",
        "costs.Estimate",
        "costs.Machines",
        "costs.Recommendations",
        "costs.Row",
        "costs.Spread",
        "costs.cluster.ClusterCosts",
        "doctor.Diagnosis",
        "doctor.Finding",
        "layouts.Answer",
        "layouts.Layout",
        "layouts.Piece",
        "layouts.Placement",
        "layouts.Request",
        "procmem.Mapping",
        "procmem.NamedRange",
        "procmem.Owner",
        "procmem.Sample",
    )
}


def _shorten_signature(
    _app: Sphinx,
    _kind: str,
    name: str,
    _object: object,
    _options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Shorten types, and show no signature of classes that users do not call."""
    if name in _NOT_CONSTRUCTED:
        return "", None
    return signature and _short(signature), returns and _short(returns)


def _skip_fields(
    _app: Sphinx, _kind: str, _name: str, member: object, _skip: bool, _options: object
) -> bool | None:
    """Leave out the fields of named tuples: the section Attributes of the class describes them."""
    return True if isinstance(member, type(Piece.start)) else None


def _fill_width(_app: Sphinx, doctree: document) -> None:
    """Scale pictures to the page, which makes Sphinx link them to their full size."""
    for picture in doctree.findall(image):
        picture["width"] = "100%"


def setup(app: Sphinx) -> None:
    """Connect this project's handlers around napoleon's, whose priority is 500."""
    app.connect("autodoc-process-docstring", _before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", _after_napoleon, priority=600)
    app.connect("autodoc-process-signature", _shorten_signature)
    app.connect("autodoc-skip-member", _skip_fields)
    app.connect("doctree-read", _fill_width)
