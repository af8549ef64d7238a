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
html_theme = "pydata_sphinx_theme"
html_title = f"{project} {version}"
html_show_sourcelink = False
html_copy_source = False
html_css_files = ["extra.css"]
html_static_path = ["_static"]
_single = "start", "study", "recipes", "gpus", "library", "costs", "trouble", "contributing", "changes"
html_sidebars = {page: [] for page in _single}  # they have no pages below them
html_theme_options = {"github_url": settings["git_url"], "show_toc_level": 2, "navigation_with_keys": False,
                      "header_links_before_dropdown": 8, "secondary_sidebar_items": ["page-toc"],
                      "navbar_persistent": ["search-button"],
                      "footer_start": ["copyright"], "footer_end": []}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True, "exclude-members": "forward, with_traceback"}
autodoc_typehints = "signature"


def as_rst(text):
    """Returns a docstring or comment as reStructuredText: text in backticks is code, the rest is plain."""
    parts = text.split("`")
    plain = [re.sub(r"([*|_\\])", r"\\\1", part) for part in parts]
    code = [rf"\ ``{part}``\ " if part.strip() == part and part else part for part in parts]
    return "".join(code[i] if i % 2 else plain[i] for i in range(len(parts)))


def field_lines():
    """Yields each field of `Config` with its comment and its range."""
    from vitdistill.cli import field_comments
    from vitdistill.config import Config

    comments = field_comments()
    for f in fields(Config):
        allowed = f.metadata["allowed"]
        within = f"in {allowed}"
        if isinstance(allowed, tuple):
            within = f"one of {', '.join(word or repr(word) for word in allowed)}"
        yield f.name, comments[f.name] + f"; {within}" * bool(allowed)


def parameter_lines(thing, name):
    """Returns (parameter, comment) pairs of a function or class; 'return' is the name of the returned
    value."""
    if name == "vitdistill.config.Config":
        return list(field_lines())
    try:
        comments = docments(thing, full=True, returns=True)
    except (TypeError, ValueError, OSError, IndexError):  # of C, or made by a decorator
        return []
    texts = {key: about.get("docment") for key, about in comments.items()}
    return [(key, " ".join(text.split())) for key, text in texts.items() if text]


def process_docstring(app, what, name, thing, options, lines):
    """Adds the comments of parameters to a docstring, both as plain text."""
    lines[:] = [as_rst(line) for line in lines]
    if what not in ("function", "class", "method"):
        return
    pairs = parameter_lines(thing, name)
    lines += [""] if pairs else []
    for key, text in pairs:
        lines.append(f":{'returns' if key == 'return' else f'param {key}'}: {as_rst(text)}")


def setup(app):
    app.connect("autodoc-process-docstring", process_docstring)
