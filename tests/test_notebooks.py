"""Every experiment notebook runs under plain papermill; analysis notebooks run on its runs, and on none."""
import ast
import contextlib
import io
import json
import re
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import papermill
import pytest
import timm
import yaml

from conftest import PYTHON, ROOT, environment
from vitdistill.cli import main
from vitdistill.launch.queue import grid_cells, run_batch
from vitdistill.runs import find_runs
from vitdistill.study.compare import load_comparison, main as compare
from vitdistill.teachers.card import answers_head
from vitdistill.train.loop import train

EXPERIMENTS = ROOT / "nbs/experiments"
SMALL_VIT = dict(img_size=32, patch_size=8, embed_dim=96, depth=2, num_heads=3)


def execute(name, output, cwd=ROOT, arm="", **parameters):
    parameters |= dict(arm=arm) if arm else {}
    notebook, = (ROOT / "nbs").glob(f"*/{name}.ipynb")
    papermill.execute_notebook(str(notebook), str(output), parameters, cwd=str(cwd), progress_bar=False)
    return json.loads(output.read_text())


def definitions(name, *constants):
    """What a notebook imports and defines, and constants by name, without its results."""
    notebook, = (ROOT / "nbs").glob(f"*/{name}.ipynb")
    sources = ["".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"]
               if cell["cell_type"] == "code"]
    kept = [node for source in sources for node in ast.parse(source).body
            if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
            or isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in constants]
    found = {}
    exec(compile(ast.Module(kept, []), str(notebook), "exec"), found)
    return SimpleNamespace(**found)


def said(notebook):
    """What its cells printed, in one line: notebooks wrap their sentences."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    printed = [line for output in outputs for line in output.get("text", [])]
    return " ".join("".join(printed).split())


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """A study at its smallest, trained two runs at a time: a teacher that learns enough to be healthy, a
    plain student, one that names the teacher, and an arm that fails."""
    folder = tmp_path_factory.mktemp("study")
    where = dict(runs_dir=str(folder / "runs"), work_dir=str(folder / "work"), data_fraction=0.5)
    vit = dict(notebook="e00_teacher", student="vit_tiny_patch16_224", student_kwargs=SMALL_VIT, epochs=32,
               batch_size=64, lr=2e-3, precision="fp32")  # bf16 rounds otherwise in batches of another size
    plain = dict(notebook="e01_baseline_resnet50")
    taught = dict(notebook="e02_distilled_resnet50", teacher="teacher", teacher_precision="fp32")
    study = dict(common=dict(preset="demo", student="test_resnet", epochs=2, **where),
                 teachers=dict(teacher=vit), baseline="plain", seeds=[1],
                 arms=dict(plain=plain, taught=taught, broken=dict(plain, student="resnet5")))
    (file := folder / "pair.yaml").write_text(yaml.safe_dump(study))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        cells = run_batch(grid_cells(file, folder / "out"), folder / "out", at_once=2)
    return SimpleNamespace(folder=folder, file=file, printed=printed.getvalue(),
                           cells={cell.arm.partition("/")[2]: cell for cell in cells})


@pytest.fixture(scope="module")
def study(batch):
    """The folder of this study."""
    return batch.folder


def pictures_of(notebook):
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return [output for output in outputs if "image/png" in str(output)]


def test_study_runs_by_papermill(batch):
    runs = {run.config.experiment: run for run in find_runs(batch.folder / "runs")}
    states = {name: run.status for name, run in runs.items()}
    assert states == dict(teacher="done", baseline="done", distilled="done")
    measured = runs["teacher"].result["held_out_top1"]
    assert runs["distilled"].result["teacher_top1"] == pytest.approx(measured, abs=1e-4)
    text = batch.cells["taught"].place.read_text()
    assert "epoch 1/2" in text and "epoch 2/2" in text  # a line an epoch in the executed notebook
    for name, arm in (("teacher", "teacher"), ("baseline", "plain"), ("distilled", "taught")):
        notebook = json.loads(batch.cells[arm].place.read_text())
        assert f"record: {runs[name].folder}" in said(notebook)  # where to look
        assert pictures_of(notebook)


def test_untagged_parameters_are_refused(tmp_path):
    """papermill puts its cell above a parameters cell without a tag, which would overwrite what was given."""
    notebook = json.loads((EXPERIMENTS / "e01_baseline_resnet50.ipynb").read_text())
    for cell in notebook["cells"]:
        cell["metadata"].pop("tags", None)
    (tmp_path / "untagged.ipynb").write_text(json.dumps(notebook))
    given = dict(preset="demo", lr=0.123, runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"))
    with pytest.raises(papermill.PapermillExecutionError, match="give the cell of the parameters the tag"):
        papermill.execute_notebook(str(tmp_path / "untagged.ipynb"), str(tmp_path / "ran.ipynb"), given,
                                   cwd=str(ROOT), progress_bar=False)
    assert not (tmp_path / "runs").exists()


def small_e01(*lines):
    """The parameters and the training of e01 on a few digits, with a cell of one's own between them."""
    notebook = json.loads((EXPERIMENTS / "e01_baseline_resnet50.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    first = next(n for n, cell in enumerate(code) if "parameters" in cell["metadata"].get("tags", []))
    code[first]["source"] = ["preset:str = 'demo'\n", "student:str = 'resnet10t'\n", "nproc:int = None\n",
                             "data_fraction:float = .05\n", "epochs:int = 1\n", "arm:str = None\n",
                             "runs_dir:str = 'runs'\n", "work_dir:str = 'work'\n", "fields:dict = {}\n"]
    own = dict(code[first], id="mine", metadata={}, source=list(lines))
    return notebook | dict(cells=[code[first], own, code[first + 1]])


def test_a_field_in_a_later_cell_counts_or_is_refused(tmp_path):
    (tmp_path / ".vitdistill").touch()
    cells = dict(typed=["momentum:float = 0.5\n", "lr:float = 0.077\n"], untyped=["momentum = 0.5"])
    for name, lines in cells.items():
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(small_e01(*lines)))
    papermill.execute_notebook(str(tmp_path / "typed.ipynb"), str(tmp_path / "ran.ipynb"), cwd=str(tmp_path),
                               progress_bar=False)
    run, = find_runs(tmp_path / "runs")
    assert (run.config.momentum, run.config.lr, run.status) == (0.5, 0.077, "done")
    with pytest.raises(papermill.PapermillExecutionError, match="momentum = 0.5 has no type"):
        papermill.execute_notebook(str(tmp_path / "untyped.ipynb"), str(tmp_path / "ran.ipynb"),
                                   cwd=str(tmp_path), progress_bar=False)


@pytest.mark.parametrize("how", ["script", "ipython"])
def test_a_notebook_trains_as_a_script(tmp_path, how):
    """As nbconvert makes one, run by Python, and as IPython runs a notebook."""
    (tmp_path / ".vitdistill").touch()
    notebook = small_e01("fields = {'seed': 7}\n")
    (tmp_path / "small.ipynb").write_text(json.dumps(notebook))
    (tmp_path / "small.py").write_text("\n".join("".join(cell["source"]) for cell in notebook["cells"]))
    command = [PYTHON, "small.py"] if how == "script" else [PYTHON, "-m", "IPython", "small.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, env=environment() | dict(MPLBACKEND="agg"), text=True,
                          capture_output=True, timeout=300)
    run, = find_runs(tmp_path / "runs")
    assert (run.status, run.config.seed) == ("done", 7), done.stdout + done.stderr


def test_paper_analysis_draws_the_runs(study):
    execute("a01_paper", study / "a01.ipynb", reports=str(study / "runs"), out=str(study / "out"))
    for name in ("figure1", "figure2", "figure3", "figure4"):
        assert (study / "out/figures" / f"{name}.svg").stat().st_size > 10_000
    table = pd.read_csv(study / "out/tables/timing.csv")
    assert {102.6, 456} <= {*table.select_dtypes("number").to_numpy().ravel()}  # published, beside ours
    assert "figure4" in (study / "out/index.html").read_text()


def test_the_pair_is_compared(study, tmp_path):
    """The difference of two runs on the digits is that of their records; one seed has an interval over test
    images."""
    assert main(["figures", "--reports", str(study / "runs"), "--out", str(tmp_path)]) == 0
    runs = {run.config.experiment: run for run in find_runs(study / "runs")}
    plain, taught = (runs[arm].result["test_top1"] for arm in ("baseline", "distilled"))
    row, = pd.read_csv(tmp_path / "tables/pair.csv").itertuples()
    assert (row.other_top1, row.arm_top1, row.difference) == pytest.approx((plain, taught, taught - plain))
    assert row.low < row.difference < row.high and row.interval == "test images"
    assert row.runs == f"{runs['distilled'].name}, {runs['baseline'].name}"
    page = (tmp_path / "index.html").read_text()
    assert 'href="pair.html"' in page and all(run.name in page for run in runs.values())


def test_a_study_is_trained_and_compared(batch, tmp_path, capsys):
    """A teacher, then a student that names it; the comparison knows both; an arm that fails stops no
    other."""
    states = {name: cell.state for name, cell in batch.cells.items()}
    assert "unknown model 'resnet5'" in states.pop("broken")
    assert set(states.values()) == {"done"}, states
    assert "3 done, 1 failed, 0 running, 0 left" in batch.printed
    runs = {arm: run for run in find_runs(batch.folder / "runs") for arm in run.arms}
    assert runs.keys() == {"pair/teacher", "pair/plain", "pair/taught"}
    assert runs["pair/taught"].config.teacher_weights == str(runs["pair/teacher"].model)
    assert compare([str(batch.file), "--runs", str(batch.folder / "runs"), "--out", str(tmp_path)]) == 0
    gap = 100 * (runs["pair/taught"].result["test_top1"] - runs["pair/plain"].result["test_top1"])
    assert f"taught minus plain: {gap:+.1f} points" in capsys.readouterr().out
    assert (tmp_path / "pair.html").is_file() and (tmp_path / "tables/pair.csv").is_file()
    assert {"pair_forest.svg", "pair_curves.svg"} <= {path.name for path in (tmp_path / "figures").iterdir()}


def test_a_new_arm_is_a_line_of_the_file(batch, tmp_path, monkeypatch):
    """Only this arm trains; here as in JupyterLab, where the curve is drawn meanwhile."""
    study = yaml.safe_load(batch.file.read_text())
    del study["arms"]["broken"]
    study["arms"]["alone"] = dict(study["arms"]["plain"], label_smoothing=0.1, data_fraction=0.1,
                                  runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"))
    (file := tmp_path / "pair.yaml").write_text(yaml.safe_dump(study))
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook")
    cells = run_batch(grid_cells(file, tmp_path / "out"), tmp_path / "out")
    assert [cell.state for cell in cells] == ["done"] * 4
    notebook, = (json.loads(cell.place.read_text()) for cell in cells if cell.arm == "pair/alone")
    assert len(pictures_of(notebook)) == 2  # while it trains, and below
    assert len(find_runs(batch.folder / "runs")) == 3 and len(find_runs(tmp_path / "runs")) == 1
    assert "alone" in load_comparison(file).table().arm.to_list()


def test_deit_notebook(tmp_path):
    """An untrained convnet teaches a ViT with a distillation token; both heads, joined in both ways, are
    reported."""
    where = dict(runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"), data_fraction=0.5)
    execute("e03_deit_from_regnet", tmp_path / "e03.ipynb", teacher="test_resnet", teacher_size=32,
            allow_untrained=True, epochs=2, **where,
            student_kwargs=dict(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3))
    run = next(r for r in find_runs(tmp_path / "runs") if r.config.experiment == "deit")
    assert set(run.result["heads"]) == {"class", "distillation", "softmax", "logits"}
    for head in ("class", "distillation"):
        last = run.metrics()[f"test_{head}_top1"].iloc[-1]
        assert last == pytest.approx(run.result["heads"][head], abs=1e-5)
    assert run.result["test_top1"] == pytest.approx(run.result["heads"]["softmax"], abs=0.005)  # added
    execute("a06_deit", tmp_path / "a06.ipynb", reports=str(tmp_path / "runs"), out=str(tmp_path / "out"))
    heads = pd.read_csv(tmp_path / "out/tables/deit_heads.csv").set_index("head").top1
    for name, head in {"class head": "class", "softmaxes added": "softmax"}.items():
        assert heads[name] == run.result["heads"][head]
    methods = pd.read_csv(tmp_path / "out/tables/deit_methods.csv").set_index("arm")
    assert methods.top1.dropna().tolist() == pytest.approx([run.result["test_top1"]])
    assert methods.published["soft"] == 0.818
    published = pd.read_csv(tmp_path / "out/tables/deit_published.csv", dtype=str).set_index("model")
    assert "83.0" in published.loc["DeiT-B hard distillation"].to_numpy()


@pytest.mark.slow
@pytest.mark.parametrize("room", ["data/03_augment", "models/01_layers", "tasks/00_can"])
def test_room_runs_from_top_to_bottom(room, tmp_path):
    """As JupyterLab's "run all", cells for a GPU too; but for the last, which exports the package anew."""
    notebook = json.loads((ROOT / f"nbs/{room}.ipynb").read_text())
    assert "nbdev_export()" in "".join(notebook["cells"].pop()["source"])
    (tmp_path / "room.ipynb").write_text(json.dumps(notebook))
    papermill.execute_notebook(str(tmp_path / "room.ipynb"), str(tmp_path / "ran.ipynb"),
                               cwd=str(ROOT / "nbs"), progress_bar=False)


@pytest.mark.slow
def test_finetuning_notebook(study, tmp_path):
    """A trained transformer goes on at 48 px with its head: on labels alone, and taught at that size."""
    begun = next(run for run in find_runs(study / "runs") if run.config.experiment == "teacher")
    where = dict(runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"), data_fraction=0.5,
                 epochs=4, lr=1e-3)
    where |= dict(student_weights=str(begun.model), student_size=48, warmup_epochs=0)
    execute("e07_finetune", tmp_path / "alone.ipynb", distillation="none", **where)
    execute("e07_finetune", tmp_path / "taught.ipynb", teacher=begun.config.student, teacher_kwargs=SMALL_VIT,
            teacher_weights=str(begun.model), allow_untrained=True, **where)
    runs = {bool(run.config.teacher): run for run in find_runs(tmp_path / "runs")}
    for run in runs.values():
        c = run.config
        shapes = timm.models.load_state_dict(str(run.model / "model.safetensors"))
        assert (c.student, c.student_size, c.student_head) == (begun.config.student, 48, "keep")
        assert shapes["pos_embed"].shape == (1, 1 + 6 * 6, 96) and "img_size" not in c.student_kwargs
        assert run.result["test_top1"] > 0.3
    assert runs[True].config.teacher_size == 48 and runs[True].result["teacher_top1"] is not None


@pytest.mark.slow
def test_deit_notebook_with_its_own_teacher(tmp_path):
    """Without weights, e03 first trains the convnet that its preset names, and that teacher passes the health
    check."""
    where = dict(runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"), epochs=2,
                 data_fraction=0.5)
    execute("e03_deit_from_regnet", tmp_path / "e03.ipynb", teacher="test_resnet",
            student_kwargs=dict(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3), **where)
    runs = {run.config.experiment: run for run in find_runs(tmp_path / "runs")}
    teacher, student = runs["deit_teacher"], runs["deit"]
    assert teacher.status == student.status == "done" and student.result["teacher_top1"] > 0.3


@pytest.mark.slow
def test_out_of_fold_notebook(tmp_path):
    """Without weights, e02 trains a teacher on each half; the record says how often the unseen one's label is
    true."""
    where = dict(runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"))
    execute("e00_teacher", tmp_path / "e00.ipynb", fold="1/2", student_kwargs=SMALL_VIT, **where)  # of them
    execute("e02_distilled_resnet50", tmp_path / "e02.ipynb", out_of_fold=True, teacher_kwargs=SMALL_VIT,
            student="test_resnet", epochs=1, distillation="hard", **where)
    runs = find_runs(tmp_path / "runs")
    assert sorted(run.config.fold for run in runs) == ["", "1/2", "2/2"]
    held_out = [run.result["held_out_top1"] for run in runs if run.config.fold]
    student = next(run for run in runs if not run.config.fold)
    assert student.config.teacher_hash.count("+") == 1
    assert abs(student.result["true_answers"] - sum(held_out) / 2) < 0.15


def test_weights_at_hand_are_adopted(study, tmp_path):
    """With a new head they answer by chance, and the memo is filled for their student."""
    teacher = next(run for run in find_runs(study / "runs") if run.config.experiment == "teacher")
    ran = execute("e04_adopted_teacher", tmp_path / "e04.ipynb", preset="demo", adopted="new", new_head=True,
                  seed=7, fill_memo=True, padding=0, keep_answers=True,  # seed 1: the head that it began with
                  weights=str(teacher.model / "model.safetensors"), student_kwargs=SMALL_VIT,
                  work_dir=str(tmp_path), runs_dir=str(tmp_path / "runs"))
    assert re.search(r"on \d+ held-out images \(10% of train\)", said(ran))  # it can't know: it is told
    card = json.loads((tmp_path / "new/model/card.json").read_text())
    assert card["top1_held_out"] < 0.4 < teacher.result["held_out_top1"]
    assert list((tmp_path / "new/model").glob("memo-*.bin"))
    record, = find_runs(tmp_path / "runs")
    assert record.status == "done" and record.result["weights_hash"] == card["weights_hash"]
    decided = set(np.load(record.folder / "predictions.npz"))
    assert decided >= {f"{part}_class_decision" for part in ("test", "val", "train")}
    assert answers_head(record.folder / "answers.npz")["card"] == card and "answers.npz'" in said(ran)


@pytest.mark.parametrize("ranks", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_notebook_on_several_ranks(tmp_path, ranks):
    """papermill runs e02 with `-p nproc 2` (gloo) on the digits: one rank's metrics, without batch norm."""
    place = dict(runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"), data_fraction=0.3)
    vit = dict(student="vit_tiny_patch16_224", epochs=3, optimizer="adamw", lr=0.002, batch_size=64)
    fixed = dict(allow_untrained=True, device="cpu", precision="fp32", teacher_precision="fp32",
                 distillation="hard")
    ran = execute("e02_distilled_resnet50", tmp_path / "e02.ipynb", nproc=ranks, student_kwargs=SMALL_VIT,
                  teacher_kwargs=SMALL_VIT, **place, **vit, **fixed)
    assert re.search(f"torchrun --standalone .*--nproc-per-node {ranks} -m vitdistill.train", said(ran))
    several, = find_runs(tmp_path / "runs")
    assert f"nproc-per-node {ranks} " in several.environment["command"]
    alone = replace(several.config, runs_dir=str(tmp_path / "alone/runs"),
                    work_dir=str(tmp_path / "alone/work"))
    one, many = train(alone).metrics(), several.metrics()
    assert len(one) == 3 and one.train_loss.iloc[-1] < one.train_loss.iloc[0] - 0.05  # it learned
    names = ["lr", "train_loss", *(name for name in one if "top" in name), "memo_hit_rate"]
    pd.testing.assert_frame_equal(one[names], many[names], rtol=0, atol=1e-5)
