"""The repository's own rules: notebooks are the source, clean, and documented."""
import ast
import functools
import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import yaml

from conftest import ROOT
from vitdistill.config import Config, field_names, load

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
TEMPLATES = [p for p in NOTEBOOKS if p.parent.name in ("experiments", "analysis")]
LENGTH = 45  # lines of an exported cell


def cells(notebook, kind="code"):
    return [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == kind]


def test_export_has_not_drifted(tmp_path):
    """Exporting into an empty copy gives exactly the modules of the checkout, none more, none fewer."""
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    for name in ("settings.ini", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, check=True)
    exported, committed = ({p.name: p.read_text() for p in (root / "vitdistill").glob("*.py") if p.stem != "_modidx"}
                           for root in (tmp_path, ROOT))  # nbdev's index is not in git
    assert exported.keys() == committed.keys()
    for name in exported:
        assert exported[name] == committed[name], (f"vitdistill/{name} is not what nbs/ exports: run nbdev_export, "
                                                   "or nbdev_update to keep a hand edit")


def test_notebooks_are_clean(tmp_path):
    """nbdev_clean would change nothing: no outputs of machines, no stray metadata, the parameters tag kept."""
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    subprocess.run([Path(sys.executable).parent / "nbdev_clean"], cwd=tmp_path, check=True)
    for notebook in NOTEBOOKS:
        cleaned = (tmp_path / notebook.relative_to(ROOT)).read_text()
        assert notebook.read_text() == cleaned, f"{notebook.name} is not clean: run nbdev_clean"


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


def exported_faults(sources):
    """Exported cells that are too long (but Config's), or that no example follows: (cell, what is wrong), from 0."""
    found, exported = [], [bool(re.search(r"^#\| *exports?i?\b", source, re.M)) for source in sources]
    for i, source in enumerate(sources):
        if not exported[i]:
            continue
        defined = [node.name for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]
        if len(lines) > LENGTH and "Config" not in defined:
            found.append((i, f"exports {len(lines)} lines, not {LENGTH} at most"))
        public = [name for name in defined if not name.startswith("_")]
        if public and (i + 1 == len(sources) or exported[i + 1]):
            found.append((i, f"exports {', '.join(public)}: no code cell with an example or a test follows directly"))
    return found


@pytest.mark.parametrize("sources, at", [
    (["#| export\ndef f(): pass", "f()", "#| export\ndef _g(): pass", "#| export\na = 1"], []),
    (["#| export\nclass A: pass", "#| export\ndef f(): pass"], [0, 1]),
    (["#| export\n#| eval: false\nclass A: pass", "#| exports\ndef f(): pass", "f()"], [0]),
    (["#| export\n" + "\n\na = 1" * 45, "#| export\n" + "a = 1\n" * 46], [1]),
    (["#| export\nclass Config:\n" + "    a = 1\n" * 46, "Config()"], []),
])
def test_faults_of_exported_cells_are_seen(sources, at):
    assert [i for i, _ in exported_faults(sources)] == at


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_exported_cells_are_short_and_tested(notebook):
    faults = exported_faults(["".join(cell["source"]) for cell in cells(notebook)])
    assert not faults, "\n".join(f"{notebook.name}, code cell {i + 1}: {fault}" for i, fault in faults)


def test_training_needs_no_notebook_tools():
    """The package trains on a machine that has torch, torchvision, timm and pandas."""
    probe = "import sys, vitdistill.train; print(*{m.split('.')[0] for m in sys.modules})"
    said = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    loaded = set(said.split())
    assert not loaded & {"nbdev", "fastcore", "execnb", "papermill", "IPython", "seaborn", "sklearn", "ipykernel"}


def test_nothing_large_or_foreign_is_committed():
    foreign = (".safetensors", ".pt", ".pth", ".webp")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.split("\n"):
        if name and (ROOT / name).is_file():
            assert (ROOT / name).stat().st_size < 3e6 and Path(name).suffix not in foreign, name


def test_records_are_committed_without_their_logits():
    """Nine tenths of a record; what they say of calibration stands beside it. Images and labels are kept once."""
    records = sorted((ROOT / "reports/runs").glob("*/predictions*.npz"))
    endings = "_logits", "_image", "_label", "_top5"
    heavy = [str(file) for file in records if any(name.endswith(endings) for name in np.load(file).files)]
    assert records and not heavy, "run python -m vitdistill.calibration FOLDER ..., then python -m vitdistill.records"


ASKED_FIRST = "7b98faa"  # records that came later than this commit had their question before their answer
BY_ISSUE = {"baseline-resnet50_cifar-labels-s1-ca935cf9", # a quarter of an hour on a GPU, asked for in issue 46
            "distilled-resnet50_cifar-vit_tiny_patch16_224-s1-5be64162"}
LOST = {"2ee85e7d57346dbd5179f057dfbb8a7d34e8f4a4": "64305f9"}  # with its machine -> what its session began with
ARMS = dict(e00="teacher", e01="baseline", e02="distilled", e03="deit")  # notebook -> the experiment that it runs
HANDED_ON = {*field_names(shared=True), *field_names(split=True), *field_names(group="student"), "seed"}  # by e06


def git(*words):
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return None if done.returncode else done.stdout


@functools.cache
def files_at(commit):
    """The grids and presets of a commit: path -> git's name for its bytes, which most commits share."""
    listed = (git("ls-tree", "-r", commit, "nbs/experiments/grids", "nbs/presets") or "").splitlines()
    return {path: told.split()[2] for told, path in (line.split("\t") for line in listed)}


@functools.cache
def yaml_of(blob):
    return yaml.load(git("cat-file", "blob", blob), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@functools.cache
def cells_at(commit):
    """Every cell of every grid of a commit: experiment, and the fields that its preset and the cell itself give."""
    found, files = [], files_at(commit)
    for path in (path for path in files if re.fullmatch(r"nbs/experiments/grids/[^/]+\.yaml", path)):
        grids = yaml_of(files[path])
        for grid in grids if isinstance(grids, list) else [grids]:
            fixed, vary = grid.get("parameters") or {}, grid.get("vary") or {}
            for values in itertools.product(*vary.values()):
                cell = {**fixed, **dict(zip(vary, values))}
                parts = [cell.get("role") or ARMS.get(grid["notebook"][:3])]
                if grid["notebook"] == "e06_pretrain":  # an encoder, and perhaps the model that is fine-tuned from it
                    parts = ["pretrain", *filter(None, [cell.get("role")])]
                preset = files.get(f"nbs/presets/{cell.get('preset')}.yaml")
                recipe = yaml_of(preset) if preset else {}
                goes_on = grid["notebook"] == "e07_finetune"  # a student is built as its weights' card says
                for part, given in zip(parts, (cell, {key: cell[key] for key in cell.keys() & HANDED_ON})):
                    asked = (recipe.get("common") or {}) | (recipe.get(part) or {}) | given
                    found.append(("finetune", asked | dict(student_kwargs=ANY)) if goes_on else (part, asked))
    return found


USUAL, ASIDE = Config(), {*field_names(group="found"), "data_root", "image_size"}
ASKED = [name for name in field_names(hashed=True) if name not in ASIDE and not name.endswith("_weights")]


def is_cell(config, experiment, given):
    """Whether a record's config is what a cell gives, and the defaults; paths and what a machine decides aside."""
    if experiment != config.experiment or bool(config.fold_weights) != bool(given.get("out_of_fold")):
        return False
    return all(getattr(config, name) == given.get(name, getattr(USUAL, name))
               for name in ASKED if name not in (config.auto or ()))


def test_cells_of_a_commit_are_told_from_others():
    """The long run's plain arm is a cell of its commit, not of an earlier one, and not with another learning rate."""
    record = ROOT / "reports/runs/baseline-resnet50-labels-s1-b1635655"
    config, commit = load(record / "config.yaml"), json.loads((record / "environment.json").read_text())["commit"]
    if git("cat-file", "-e", f"{commit}^") is None:
        pytest.skip("this clone has no history")
    assert any(is_cell(config, *cell) for cell in cells_at(commit))
    assert not any(is_cell(config, *cell) for cell in cells_at("9d034d6"))
    assert not any(is_cell(replace(config, lr=0.5), *cell) for cell in cells_at(commit))


def test_a_grid_asks_before_its_runs_answer():
    """The commit that a new record names, or that it began with where it is lost, holds the cell of a grid."""
    if git("cat-file", "-e", ASKED_FIRST) is None:
        pytest.skip("this clone has no history")
    old = set((git("ls-tree", "--name-only", ASKED_FIRST, "reports/runs/") or "").split())
    for record in sorted((ROOT / "reports/runs").glob("*/environment.json")):
        if record.parent.relative_to(ROOT).as_posix() in old or record.parent.name in BY_ISSUE:
            continue
        config, commit = load(record.parent / "config.yaml"), json.loads(record.read_text()).get("commit", "")
        commit = LOST.get(commit, commit)
        if config.experiment == "adopted_teacher":  # weights from elsewhere, measured: it answers no question
            continue
        known = commit and git("cat-file", "-e", commit) is not None
        assert known, f"{record.parent.name} names no commit of this history"
        assert any(is_cell(config, *cell) for cell in cells_at(commit)), (
            f"{record.parent.name} is no cell of a grid at {commit[:8]}: write and commit its grid before it runs")
