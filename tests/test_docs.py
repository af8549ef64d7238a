"""How the site's pages are made from notebooks and from Markdown; `make docs` builds it and follows its
links."""
import importlib.util

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from conftest import ROOT
from vitdistill.config import field_names


def load(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load("build")


def test_directives_are_honoured():
    sources = ["#| default_exp views", "#| export\n#| eval: false\nmain()", "#| hide\nimport pytest",
               "#| slow\ntrain()", "1 + 1", "#| export"]
    title = new_markdown_cell("# Views\n> What is seen.")
    notebook = new_notebook(cells=[title, *map(new_code_cell, sources)])
    assert [build.is_run(cell) for cell in notebook.cells[1:]] == [True, False, True, False, True, True]
    shown = [cell.source for cell in build.as_page(notebook).cells]
    assert shown == ["# Views\n> What is seen.", "main()", "train()", "1 + 1"]


def test_links_lead_to_pages_images_and_the_repository():
    files = set()
    text = ("[a](reports/study.md#x) ![b](reports/figures/answer.svg) [c](reports/bench) "
            "[d](https://e.org) [`f`](Makefile#L1) [g](#h)")
    online = build.REPOSITORY
    found = build.relink(text, "README.md", "sub/start", files)
    assert found == (f"[a](../study.md#x) ![b](../reports/figures/answer.svg) "
                     f"[c]({online}/tree/main/reports/bench) [d](https://e.org) "
                     f"[`f`]({online}/blob/main/Makefile#L1) [g](#h)")
    assert files == {"reports/figures/answer.svg"}
    with pytest.raises(SystemExit, match="README.md links to nowhere.md"):
        build.relink("[a](nowhere.md)", "README.md", "start", files)


def test_every_page_that_people_write_is_on_the_site():
    """The pages of docs/ keep their names; README is `start`, and the side studies of reports/ have a
    folder."""
    shown = {file: page for page, file in build.PAGES.items()}
    for page in (ROOT / "docs").glob("*.md"):
        assert page.stem == "index" or shown[f"docs/{page.name}"] == page.stem
    assert shown["README.md"] == "start" and shown["reports/study.md"] == "study"
    for page in (ROOT / "reports").glob("*.md"):
        assert page.stem == "study" or shown[f"reports/{page.name}"] == f"studies/{page.stem}"
    found = build.relink("[a](gpus.md#slurm) [b](../README.md)", "docs/recipes.md", "recipes", set())
    assert found == "[a](gpus.md#slurm) [b](start.md)"


@pytest.mark.parametrize("page", [page for page, file in build.PAGES.items() if file.endswith(".ipynb")])
def test_links_of_a_notebook_are_there(page):
    for cell in nbformat.read(ROOT / build.PAGES[page], 4).cells:
        if cell.cell_type == "markdown":
            build.relink(cell.source, build.PAGES[page], page, set())


def test_what_a_site_loads_from_elsewhere_is_found(tmp_path):
    page = tmp_path / "a.html"
    page.write_text('<a href="https://e.org">e</a><img src="c.png"><img src="https://e.org/badge.svg">')
    assert build.foreign_loads(tmp_path) == []
    page.write_text('<script src="https://e.org/s.js"></script><link rel="stylesheet" href="//e.org/s.css">')
    assert build.foreign_loads(tmp_path) == ["a.html loads https://e.org/s.js", "a.html loads //e.org/s.css"]


def test_docstrings_are_plain_text_with_code():
    conf = load("conf")
    assert conf.as_rst("`a*b` and **given, x_") == r"\ ``a*b``\  and \*\*given, x\_"
    from vitdistill.teachers.answers import break_even

    assert conf.parameter_lines(break_even, "break_even") and conf.parameter_lines(len, "len") == []
    told = dict(conf.parameter_lines(None, "vitdistill.config.Config"))
    assert told.keys() == {*field_names()} and all(told.values())
