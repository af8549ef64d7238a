"""The repository's own rules: notebooks are the source, clean, and documented; modules depend downwards only."""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from conftest import ROOT

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
TEMPLATES = [p for p in NOTEBOOKS if p.parent.name in ("experiments", "analysis")]
LAYERS = ["config", "data", "views", "augment", "runs", "records", "live", "models", "complexity", "losses", "teachers", "answers", "ranks",
          "setup", "outcome", "train", "launch", "grids", "analysis", "trends", "agreement", "watch", "report", "contenders", "bench"]


def cells(notebook, kind="code"):
    return [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == kind]


def test_export_has_not_drifted(tmp_path):
    """Exporting into an empty copy gives exactly the modules of the checkout, none more, none fewer."""
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    for name in ("settings.ini", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, check=True)
    exported, committed = ({p.name: p.read_text() for p in (root / "vitdistill").glob("*.py")} for root in (tmp_path, ROOT))
    assert exported.keys() == committed.keys()
    for name in exported:
        assert exported[name] == committed[name], f"vitdistill/{name} is not what nbs/ exports: run nbdev_export, or nbdev_update to keep a hand edit"


def test_notebooks_are_clean(tmp_path):
    """nbdev_clean would change nothing: no outputs of machines, no stray metadata, the parameters tag kept."""
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    subprocess.run([Path(sys.executable).parent / "nbdev_clean"], cwd=tmp_path, check=True)
    for notebook in NOTEBOOKS:
        assert notebook.read_text() == (tmp_path / notebook.relative_to(ROOT)).read_text(), f"{notebook.name} is not clean: run nbdev_clean"


@pytest.mark.parametrize("notebook", TEMPLATES, ids=lambda p: p.stem)
def test_template_has_documented_parameters(notebook):
    """One cell tagged parameters; every parameter typed and, in its line or the one of its neighbours, explained."""
    tagged = [c for c in cells(notebook) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    source = "".join(tagged[0]["source"])
    assert all(isinstance(node, ast.AnnAssign) for node in ast.parse(source).body)
    assert sum("#" in line for line in source.splitlines()) >= len(source.splitlines()) - 2
    assert not any(c["outputs"] for c in cells(notebook))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_says_what_it_is(notebook):
    first = "".join(json.loads(notebook.read_text())["cells"][0]["source"])
    assert re.match(r"# .+\n+> .+", first)


def test_modules_depend_downwards_only():
    assert set(LAYERS) == {p.stem for p in (ROOT / "vitdistill").glob("*.py")} - {"__init__", "_modidx"}
    for i, name in enumerate(LAYERS):
        source = (ROOT / "vitdistill" / f"{name}.py").read_text()
        used = set(re.findall(r"^\s*from (?:vitdistill)?\.(\w+) import", source, re.M))
        assert used <= set(LAYERS[:i]), f"{name} imports {used - set(LAYERS[:i])}"


def test_training_needs_no_notebook_tools():
    """The package trains on a machine that has torch, torchvision, timm and pandas."""
    probe = "import sys, vitdistill.train; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = set(subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {"nbdev", "fastcore", "execnb", "papermill", "IPython", "seaborn", "sklearn", "ipykernel"}


def test_nothing_large_or_foreign_is_committed():
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n"):
        if name and (ROOT / name).is_file():
            assert (ROOT / name).stat().st_size < 3e6 and Path(name).suffix not in (".safetensors", ".pt", ".pth", ".webp"), name


def test_readme_names_commands_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / "README.md").read_text(), re.M))
    assert {"demo", "test"} <= named <= targets
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_readme_differences_are_those_of_the_study():
    """Each `+x.x (low to high` of the README, in points, is a row of the study's table of all differences."""
    told = re.findall(r"([+-]\d+\.\d) \((-?\d+\.\d) to (-?\d+\.\d)", " ".join((ROOT / "README.md").read_text().split()))
    known = pd.read_csv(ROOT / "reports/tables/study_together.csv")[["difference", "low", "high"]].map(lambda x: float(f"{100 * x:.1f}"))
    assert len(told) >= 3 and {tuple(map(float, numbers)) for numbers in told} <= set(known.itertuples(index=False, name=None))
