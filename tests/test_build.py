"""`make figures`: what a committed notebook keeps of its outputs, and when they are left alone."""
import importlib.util
import json
from pathlib import Path

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("reports_build", ROOT / "reports/build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


def printed(*lines, name="stdout"):
    return dict(output_type="stream", name=name, text=[*lines])


def drawn(png, **about):
    data = {"image/png": png, "text/plain": ["<Figure a>"]}
    return dict(output_type="display_data", data=data, metadata=about)


def test_warnings_and_the_root_are_left_out():
    warning = printed("/a/x.py: old\n", name="stderr")
    executed = [printed("Written: /a/b/c.md\n", "1"), warning, printed("2\n"), drawn("iVB")]
    assert build.kept_outputs(executed, Path("/a")) == [printed("Written: b/c.md\n", "12\n"), drawn("iVB")]


def test_outputs_agree_by_value_and_by_the_svg_that_they_show():
    svg = {"image/png": dict(svg="1a")}
    line = printed("0.1233 of 3\n")
    assert build.same_outputs([line, drawn("iVB", **svg)], [printed("0.1234 of 3\n"), drawn("xyz", **svg)])
    for other in [printed("0.2 of 3\n")], [printed("0.1233 of 4\n")], [line, line], [drawn("iVB")]:
        assert not build.same_outputs([line], other)
    assert not build.same_outputs([drawn("iVB", **svg)], [drawn("iVB", **{"image/png": dict(svg="1b")})])
    assert not build.same_outputs([drawn("iVB")], [drawn("xyz")])  # pictures of no SVG: by their bytes


def test_an_output_that_agrees_stays(tmp_path):
    """papermill adds a cell and counts; an output is replaced only if its value changed."""
    cells = [dict(cell_type="markdown", id="a", metadata={}, source=["# É"]),
             dict(cell_type="code", id="b", metadata={}, source=["1/3"], execution_count=None, outputs=[])]
    source, copy = tmp_path / "a00.ipynb", tmp_path / "executed.ipynb"
    notebook = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
    source.write_text(json.dumps(notebook), encoding="utf-8")

    def after(*outputs):
        injected = dict(cells[1], id="c", outputs=[printed("?")])
        ran = dict(cells[1], execution_count=3, outputs=outputs)
        copy.write_text(json.dumps(dict(cells=[cells[0], injected, ran])), encoding="utf-8")
        build.write_outputs(source, copy, Path("/a"))
        return json.loads(source.read_text(encoding="utf-8"))["cells"]

    for value in "0.3333\n", "0.3334\n":
        assert after(printed(value)) == [cells[0], dict(cells[1], outputs=[printed("0.3333\n")])]
    assert after() == cells


def test_an_unknown_notebook_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["build.py", "a99_nothing"])
    with pytest.raises(SystemExit):
        build.main()
    assert "a99_nothing" in capsys.readouterr().err
