"""Configure Sphinx for this documentation. ``make docs`` builds it into docs/_build/html."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as installed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "docs" / "_ext"), str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

project = "ptd"
author = "the ptd authors"
version = release = installed("ptd")
html_title = f"ptd {version}"

extensions = [
    *("myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"),
    *("mathml", "repository_links", "inline_svg", "other_pages", "offline"),
]
exclude_patterns = ["_build", "_ext", "figures"]
language = "en"

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

# `Name` in a docstring is a Python object (of ptd or another library) or a term. Sphinx links it if it has a target,
# and otherwise sets it as code.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    (r"py:obj", r".*"),
    (
        r"py:(class|data|exc|meth|func|attr)",
        r"(?!ptd\.|ptd_kernels\.).*",
    ),  # of other libraries, for which no inventory is loaded
]
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_type_aliases = {"Tensor": "Tensor"}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
add_module_names = False
python_maximum_signature_line_length = 88

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["ptd.css"]
html_copy_source = False
html_show_copyright = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"font-stack--monospace": "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"},
    "footer_icons": [],
}
pygments_style = "default"
pygments_dark_style = "monokai"
