"""How Sphinx builds the site; `make docs` calls it with the root of the repository as its source."""

from __future__ import annotations

from sphinx.application import Sphinx

from fedflame import __version__

project = "fedflame"
author = "The fedflame authors"
project_copyright = "The fedflame authors, Apache-2.0"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
# The root is the source, so that a link to a benchmark's page or to the changelog leads to the same file on
# the site and in the repository.
include_patterns = [
    "docs/*.md",
    "benchmarks/*/README.md",
    "examples/flower/README.md",
    "pretraining/README.md",
    "pretraining/*/README.md",
    "src/fedflame/assets/*/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
]
exclude_patterns = [".*", "runs", "dist", "build", "docs/_build"]

myst_heading_anchors = 4
highlight_language = "none"  # most blocks are commands and what they print
smartquotes = False  # it would turn the two hyphens of an option into a dash
default_role = "code"  # docstrings write names of the code in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_class_signature = "separated"
napoleon_numpy_docstring = False

templates_path = ["_templates"]
html_additional_pages = {"index": "front.html"}  # whoever opens the folder comes to docs/index.html
html_theme = "furo"
html_title = f"fedflame {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]


def _escape_bars(
    app: Sphinx, what: str, name: str, of: object, options: dict[str, object], lines: list[str]
) -> None:
    """|D| is a number of rows in our docstrings, and would be a substitution to Sphinx."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


def setup(app: Sphinx) -> None:
    """Connect what Sphinx calls while it builds."""
    app.connect("autodoc-process-docstring", _escape_bars)
