"""Sphinx's configuration; `docs/build.py` lays out the pages and calls Sphinx."""
import re
import sys
from configparser import ConfigParser
from dataclasses import fields
from pathlib import Path

from fastcore.docments import docments

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project, author, copyright = settings["title"], settings["author"], settings["copyright"]
version = release = settings["version"]
language = "en"
extensions = ["myst_nb", "sphinx.ext.autodoc"]
nb_execution_mode = "off"  # docs/build.py has executed what is shown
nb_output_stderr = "remove"
nb_merge_streams = True
myst_heading_anchors = 4
suppress_warnings = ["myst.xref_missing"]  # build.py follows every link, those to places in raw HTML too
html_theme = "pydata_sphinx_theme"
html_title = f"{project} {version}"
html_show_sourcelink = False
html_copy_source = False
html_css_files = ["extra.css"]
html_static_path = ["_static"]
html_sidebars = {page: [] for page in ("recipes", "study", "contributing", "changes")}  # no pages below them
html_theme_options = {"github_url": settings["git_url"], "show_toc_level": 2, "navigation_with_keys": False,
                      "header_links_before_dropdown": 8, "secondary_sidebar_items": ["page-toc"],
                      "navbar_persistent": ["search-button"],
                      "footer_start": ["copyright"], "footer_end": []}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True, "exclude-members": "forward, with_traceback"}
autodoc_typehints = "signature"


def as_rst(text):
    """One of our docstrings or comments as reStructuredText: what is in backticks is code, the rest is plain."""
    parts = text.split("`")
    plain = [re.sub(r"([*|_\\])", r"\\\1", part) for part in parts]
    code = [rf"\ ``{part}``\ " if part.strip() == part and part else part for part in parts]
    return "".join(code[i] if i % 2 else plain[i] for i in range(len(parts)))


def field_lines():
    """What `Config` says of its fields."""
    from vitdistill.cli import field_comments
    from vitdistill.config import Config

    for f in fields(Config):
        allowed = f.metadata["allowed"]
        within = f"one of {', '.join(allowed)}" if isinstance(allowed, tuple) else f"in {allowed}"
        yield f.name, field_comments()[f.name] + f"; {within}" * bool(allowed)


def parameter_lines(thing, name):
    """(parameter, its comment) of a function or class; 'return' for what it returns."""
    if name == "vitdistill.config.Config":
        return list(field_lines())
    try:
        told = docments(thing, full=True, returns=True)
    except (TypeError, ValueError, OSError, IndexError):  # of C, or made by a decorator
        return []
    return [(key, " ".join(about["docment"].split())) for key, about in told.items() if about.get("docment")]


def process_docstring(app, what, name, thing, options, lines):
    """Add the comments of parameters to a docstring, and read both as plain text."""
    lines[:] = [as_rst(line) for line in lines]
    if what not in ("function", "class", "method"):
        return
    told = parameter_lines(thing, name)
    lines += [""] * bool(told)
    lines += [f":returns: {as_rst(text)}" if key == "return" else f":param {key}: {as_rst(text)}" for key, text in told]


def setup(app):
    app.connect("autodoc-process-docstring", process_docstring)
