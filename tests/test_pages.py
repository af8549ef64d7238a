"""The pages that people write: their links, their pictures, and the numbers that they take from tables."""
import functools
import importlib
import re
import sys

import pandas as pd
import pytest
from PIL import Image

from conftest import ROOT

PAGES = sorted(["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "nbs/README.md",
                *(path.relative_to(ROOT).as_posix() for folder in ("reports", "docs")
                  for path in (ROOT / folder).glob("*.md"))])
PAGES.remove("docs/index.md")  # of the site, whose links Sphinx follows
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def links(page):
    """(text, file, fragment) of each link of a page to a file of the repository."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S | re.M)
    for words, target in LINK.findall(text):
        path, _, fragment = target.partition("#")
        if "://" not in target and not target.startswith("mailto:"):
            yield words, (ROOT / page).parent / path if path else ROOT / page, fragment


def places(file):
    """What can be linked to in a Markdown file: ids, and headings as GitHub names them."""
    text = file.read_text(encoding="utf-8")
    heads = re.findall(r"^#+ (.+)$", text, re.M)
    slugs = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head).lower()) for head in heads)
    return {*re.findall(r'<a id="([^"]+)">', text), *(slug.replace(" ", "-") for slug in slugs)}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page):
    for words, file, fragment in links(page):
        assert file.exists(), f"{page}: [{words}] leads to {file}, which is not there"
        if fragment and file.suffix == ".md":
            lacks = f"{page}: [{words}] leads to #{fragment}, which {file.name} has not"
            assert fragment in places(file), lacks


@functools.cache
def rows(table):
    """id -> row of a saved table: ids from its Markdown, values from its CSV."""
    ids = re.findall(r'^\| <a id="([^"]+)">', table.read_text(encoding="utf-8"), re.M)
    frame = pd.read_csv(table.with_suffix(".csv"), keep_default_na=False, na_values=[""])
    assert len(ids) == len(frame), table.name
    return {name: row for name, (_, row) in zip(ids, frame.iterrows())}


def is_cell(number, cell):
    """Is a written number that cell, or the cell in points or percent, with so many decimals? A written sign
    counts."""
    value = float(number.replace(",", ""))
    digits = len(number.partition(".")[2])
    found = re.findall(r"-?\d+(?:\.\d+)?", cell) if isinstance(cell, str) else [cell]
    size = float if number[0] in "+-" else lambda one: abs(float(one))
    return any(abs(round(size(one) * times, digits) - value) < 1e-9 for one in found for times in (1, 100))


def misfit(words, row):
    """The first number of a linked text that its row doesn't have; '' where it has all."""
    interval = re.search(r"([+-]?\d[\d,.]*)%?(?: points?)? \((-?\d[\d,.]*) to (-?\d[\d,.]*)\)", words)
    if interval and "difference" in row:
        named = zip(interval.groups(), ("difference", "low", "high"))
        signed = ((number if number[0] in "+-" else f"+{number}", column) for number, column in named)
        return next((number for number, column in signed if not is_cell(number, row[column])), "")
    numbers = re.findall(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?", words)
    return next((number for number in numbers if not any(is_cell(number, cell) for cell in row)), "")


@pytest.mark.parametrize("page", PAGES)
def test_numbers_are_those_of_the_rows_that_they_link_to(page):
    """`[+2.1 (1.4 to 2.9)](tables/NAME.md#row)`: where a table changed, a person looks at the sentence."""
    for words, file, fragment in links(page):
        if file.parent.name == "tables" and fragment:
            assert fragment in rows(file), f"{page}: {file.name} has no row {fragment}"
            wrong = misfit(words, rows(file)[fragment])
            assert not wrong, f"{page}: [{words}] says {wrong}, which {file.name}#{fragment} does not"


def test_a_wrong_number_is_found():
    row = pd.Series(dict(arm="taught", difference=0.0213, low=0.014, high=0.029, top1=0.377, std="1.2 ± 0.3"))
    assert not misfit("+2.1 (1.4 to 2.9)", row) and not misfit("37.7%", row) and not misfit("1.2 points", row)
    assert misfit("+2.2 (1.4 to 2.9)", row) and misfit("+2.1 (1.4 to 2.8)", row) and misfit("37.6%", row)
    assert misfit("-2.1 (1.4 to 2.9)", row)


def test_readme_pictures_show_today():
    """`docs/first.py` and `docs/lab.py` draw them; each keeps the hash of what it shows."""
    sys.path.insert(0, str(ROOT / "docs"))  # first.py imports shapes.py beside it
    try:
        first, lab = importlib.import_module("first"), importlib.import_module("lab")
    finally:
        sys.path.remove(str(ROOT / "docs"))
    assert first.made_of() in first.PICTURE.read_text(), "run python docs/first.py"
    assert Image.open(lab.PICTURE).text.get("cells") == lab.shown_cells(), "run python docs/lab.py"
