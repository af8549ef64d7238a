"""Cells of notebooks that need a GPU (`#| cuda`, run by `nbdev_test --flags cuda`) call the checks by their
names."""
import json

import checks
import pytest

CELLS = [(file.stem, "".join(cell["source"])) for file in sorted((checks.ROOT / "nbs").rglob("*.ipynb"))
         for cell in json.loads(file.read_text())["cells"] if "".join(cell["source"]).startswith("#| cuda")]


def test_each_check_has_its_cell(monkeypatch):
    """The cells run as they stand, with no GPU asked, and between them name every check once."""
    named = []
    monkeypatch.setattr(checks, "look", named.append)
    for _, source in CELLS:
        exec(source, {})  # as nbdev does, after the notebook's other cells, which it doesn't need
    assert sorted(named) == sorted(checks.CHECKS)


@pytest.mark.parametrize("name", ["views equal the CPU's", "losses equal the CPU's", "a memo on the device"])
def test_a_check_can_be_looked_at(name):
    """What such a cell shows is a sentence; here of the CPU beside itself."""
    assert "not checked" not in checks.look(name, "cpu")
