"""Sphinx configuration of the documentation: `make docs` builds it into docs/_build/html."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fastreg import __version__

project = "fastreg"
author = "the fastreg developers"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "_site"]
exclude_patterns = ["_build"]
nitpicky = True
# Types of other packages, whose documentation would have to be downloaded to be linked; attributes that are described
# in a list of their class; words before a colon in "Returns", where napoleon expects a type.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|matplotlib|collections|pathlib|typing)\..*"),
    (r"py:attr", r"\w+"),
    (r"py:class", r".* .*"),
]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# What is included begins in the middle of another page.
suppress_warnings = ["myst.header"]

# Their docstrings are read, they are not: fastreg.integrations is documented without them.
autodoc_mock_imports = ["accelerate", "lightning", "transformers"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
# As arguments are set, and several names in one entry.
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False
html_math_renderer = "mathml"

html_theme = "furo"
html_title = "fastreg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
pygments_style = "default"
pygments_dark_style = "github-dark"
