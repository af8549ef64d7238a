"""Every experiment notebook runs under plain papermill; analysis notebooks run on its runs, and on none."""
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import papermill
import pytest
import yaml

from conftest import ROOT, environment
from vitdistill.batches import grid_cells, run_batch
from vitdistill.config import Config, config_hash, run_name, save
from vitdistill.runs import find_runs

EXPERIMENTS, ANALYSIS = ROOT / "nbs/experiments", ROOT / "nbs/analysis"
SMALL_VIT = dict(img_size=32, patch_size=8, embed_dim=96, depth=2, num_heads=3)


def execute(notebook, output, cwd=ROOT, **parameters):
    papermill.execute_notebook(str(notebook), str(output), parameters, cwd=str(cwd), progress_bar=False)
    return json.loads(output.read_text())


def said(notebook):
    """What its cells printed, in one line: notebooks wrap their sentences."""
    printed = [line for cell in notebook["cells"] for output in cell.get("outputs", []) for line in output.get("text", [])]
    return " ".join("".join(printed).split())


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The demo's path at its smallest: a teacher that learns enough to be healthy, a baseline, a distilled student."""
    folder = tmp_path_factory.mktemp("study")
    where = dict(runs_dir=str(folder / "runs"), work_dir=str(folder / "work"), data_fraction=0.5)
    execute(EXPERIMENTS / "e00_teacher.ipynb", folder / "e00.ipynb", student_kwargs=SMALL_VIT, epochs=12, **where)
    teacher = next(run for run in find_runs(folder / "runs") if run.config.experiment == "teacher")
    short = dict(epochs=2, student="resnet18", **where)
    execute(EXPERIMENTS / "e01_baseline_resnet50.ipynb", folder / "e01.ipynb", cwd=EXPERIMENTS, **short)  # as JupyterLab: in the notebook's folder
    execute(EXPERIMENTS / "e02_distilled_resnet50.ipynb", folder / "e02.ipynb", teacher_weights=str(teacher.model), teacher_kwargs=SMALL_VIT, **short)
    return folder


def test_study_runs_by_papermill(study):
    runs = {run.config.experiment: run for run in find_runs(study / "runs")}
    assert {name: run.status for name, run in runs.items()} == dict(teacher="done", baseline="done", distilled="done")
    assert runs["distilled"].result["teacher_top1"] == pytest.approx(runs["teacher"].result["held_out_top1"], abs=1e-4)
    text = (study / "e02.ipynb").read_text()
    assert "epoch 1/2" in text and "epoch 2/2" in text  # a line an epoch in the executed notebook


def test_paper_analysis_draws_the_runs(study):
    execute(ANALYSIS / "a01_paper.ipynb", study / "a01.ipynb", reports=str(study / "runs"), out=str(study / "out"))
    for name in ("figure1", "figure2", "figure3", "figure4"):
        assert (study / "out/figures" / f"{name}.png").stat().st_size > 10_000 and (study / "out/figures" / f"{name}.svg").is_file()
    table = (study / "out/tables/timing.csv").read_text()
    assert "102.6" in table and "456" in table  # published, beside ours
    assert "figure4" in (study / "out/index.html").read_text()


def test_paper_analysis_without_runs_says_so(tmp_path):
    notebook = execute(ANALYSIS / "a01_paper.ipynb", tmp_path / "a01.ipynb", reports=str(tmp_path / "none"), out=str(tmp_path / "out"))
    assert f"No runs in {tmp_path / 'none'}: only what was published is shown" in said(notebook)
    assert (tmp_path / "out/index.html").is_file() and (tmp_path / "out/figures/figure4.png").is_file()


def test_study_page_says_what_the_runs_say(study, tmp_path):
    """Each arm's accuracy and the paired difference stand on the page, with the runs they come from; one seed resolves nothing."""
    execute(ANALYSIS / "a02_study.ipynb", tmp_path / "a02.ipynb", reports=str(study / "runs"), out=str(tmp_path), dataset="digits")
    page, runs = (tmp_path / "study.md").read_text(), {run.config.experiment: run for run in find_runs(study / "runs")}
    plain, taught = (runs[arm].result["test_top1"] for arm in ("baseline", "distilled"))
    assert f"{taught:.1%} against {plain:.1%}, {100 * (taught - plain):+.1f} points (1 seed, no interval)" in page and "is not resolved from" in page
    assert all(runs[arm].name in page for arm in ("baseline", "distilled"))
    assert "data:image/svg+xml" in (tmp_path / "study.html").read_text() and (tmp_path / "figures/study_budgets.png").is_file()


def test_study_page_without_runs_says_so(tmp_path):
    execute(ANALYSIS / "a02_study.ipynb", tmp_path / "a02.ipynb", reports=str(tmp_path / "none"), out=str(tmp_path))
    assert f"No finished runs on cifar100 in {tmp_path / 'none'}" in (tmp_path / "study.md").read_text()


def test_complexity_analysis(tmp_path):
    """Architectures are measured without runs or weights; what is timed is left out where it isn't asked for."""
    execute(ANALYSIS / "a04_complexity.ipynb", tmp_path / "a04.ipynb", out=str(tmp_path / "out"), measure=False)
    assert {path.stem for path in (tmp_path / "out/figures").iterdir()} == {f"complexity_{name}" for name in ("alexnet_vgg", "attention", "differences", "models")}
    table = pd.read_csv(tmp_path / "out/tables/complexity_differences.csv")
    assert set(table.network[table["variant agrees"] == "no"]) == {"GoogLeNet, to 28 px", "ResNet-50"}  # the two that nothing explains
    assert not list(tmp_path.glob("out/*/complexity_seconds*"))


def curve_run(root, accuracy, seed=1, done=60, **over):
    """A run folder of 60 planned epochs whose test accuracy follows `accuracy(epoch)`, with noise of a point."""
    c, epoch = Config(dataset="digits", epochs=60, seed=seed, **over), np.arange(1, done + 1)
    save(c, root / run_name(c) / "config.yaml")
    noise = np.random.default_rng(seed).normal(0, 0.01, done)
    pd.DataFrame(dict(epoch=epoch - 1, test_top1=accuracy(epoch) + noise)).to_csv(root / run_name(c) / "metrics.csv", index=False)
    if done == 60:
        (root / run_name(c) / "result.json").write_text(json.dumps({"hash": config_hash(c)}))
    return root / run_name(c)


def test_trends_analysis_says_what_is_cut_short(tmp_path):
    """Two seeds a side, one run cut short in its last line, one of another layout: drawn, and said."""
    taught = dict(experiment="distilled", teacher="vit_tiny_patch16_224", distillation="hard")
    for seed in (1, 2):
        curve_run(tmp_path / "runs", lambda e: 0.7 - 0.6 * np.exp(-e / 5), seed)
        last = curve_run(tmp_path / "runs", lambda e: 0.9 - 0.85 * np.exp(-e / 15), seed, done=60 - 10 * (seed == 2), **taught)
    with (last / "metrics.csv").open("a") as file:
        file.write("50,0.")
    (curve_run(tmp_path / "runs", np.sqrt, seed=3) / "config.yaml").write_text("learning_rat: 1")
    text = said(execute(ANALYSIS / "a03_trends.ipynb", tmp_path / "a03.ipynb", reports=str(tmp_path / "runs"), out=str(tmp_path / "out")))
    assert f"Cut short: {last.name} is interrupted, 50 of 60" in text and "Left out: the config of baseline" in text
    for name in ("published", "plateau", "laws", "backtest", "crossover"):
        assert (tmp_path / f"out/figures/trends_{name}.png").stat().st_size > 10_000
    fits = pd.read_csv(tmp_path / "out/tables/trends_fits.csv")
    assert set(fits.loc[fits["AICc above the best"] == 0, "law"]) == {"exponential"}
    crossings = pd.read_csv(tmp_path / "out/tables/trends_crossovers.csv")
    row = crossings[(crossings.law == "exponential") & (crossings["fitted to epochs"] == "1 to 50")].iloc[0]
    truth = next(e for e in np.arange(5, 60, 0.1) if 0.9 - 0.85 * np.exp(-e / 15) > 0.7 - 0.6 * np.exp(-e / 5))
    assert abs(float(row["forecast crossover"]) - truth) < 2 and abs(float(row.measured) - truth) < 4


def test_trends_analysis_without_runs_says_so(tmp_path):
    text = said(execute(ANALYSIS / "a03_trends.ipynb", tmp_path / "a03.ipynb", reports=str(tmp_path / "none"), out=str(tmp_path / "out")))
    assert "only what was published is shown" in text and "epoch 397.7" in text and "epoch 2,981" in text
    assert sorted(p.name for p in (tmp_path / "out/figures").glob("*.png")) == ["trends_plateau.png", "trends_published.png"]


def test_deit_notebook(tmp_path):
    """A convnet teaches a ViT with a distillation token; both heads and both ways of joining them are reported."""
    where = dict(runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"), data_fraction=0.5)
    execute(EXPERIMENTS / "e00_teacher.ipynb", tmp_path / "e00.ipynb", role="deit_teacher", student="resnet18", epochs=8, **where)
    weights = str(next((tmp_path / "work").glob("deit_teacher-*/model")))
    execute(EXPERIMENTS / "e03_deit_from_regnet.ipynb", tmp_path / "e03.ipynb", teacher="resnet18", teacher_weights=weights,
            student_kwargs=dict(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3), epochs=2, **where)
    run = next(r for r in find_runs(tmp_path / "runs") if r.config.experiment == "deit")
    assert set(run.result["heads"]) == {"class", "distillation", "softmax", "logits"}
    assert run.result["test_top1"] == pytest.approx(run.result["heads"]["softmax"], abs=0.005)  # inference adds the softmaxes


def test_weights_at_hand_are_adopted(study, tmp_path):
    """A teacher's own weights give the accuracies it was recorded with; with a new head it answers by chance; the memo is filled for its student."""
    teacher = next(run for run in find_runs(study / "runs") if run.config.experiment == "teacher")
    where = dict(preset="demo", weights=str(teacher.model / "model.safetensors"), student_kwargs=SMALL_VIT, work_dir=str(tmp_path), runs_dir=str(tmp_path / "runs"))
    execute(EXPERIMENTS / "e04_adopted_teacher.ipynb", tmp_path / "own.ipynb", adopted="own", **where)
    execute(EXPERIMENTS / "e04_adopted_teacher.ipynb", tmp_path / "new.ipynb", adopted="new", new_head=True, seed=7, fill_memo=True, padding=0, **where)  # seed 1 is the head that it began with
    own, new = (json.loads((tmp_path / name / "model/card.json").read_text()) for name in ("own", "new"))
    assert own["top1_held_out"] == pytest.approx(teacher.result["held_out_top1"], abs=0.01) and new["top1_held_out"] < 0.4
    assert list((tmp_path / "new/model").glob("memo-*/answers.bin"))


@pytest.mark.parametrize("grid", sorted((EXPERIMENTS / "grids").glob("*.yaml")), ids=lambda p: p.stem)
def test_grid_names_what_is_there(grid):
    assert grid_cells(grid)


def test_unknown_parameter_is_refused(tmp_path):
    """Plain papermill only warns of a name the notebook doesn't have; the notebook itself stops, before anything is written."""
    command = [sys.executable, "-m", "papermill", str(EXPERIMENTS / "e01_baseline_resnet50.ipynb"), str(tmp_path / "o.ipynb"), "--cwd", str(ROOT),
               "-p", "epohcs", "2", "-p", "runs_dir", str(tmp_path / "runs")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "unknown parameter 'epohcs': did you mean 'epochs'?" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_batch_survives_a_failing_cell(tmp_path, capsys):
    """A grid of two: one that can't be, one that is done; run again, nothing is repeated."""
    fixed = dict(student_kwargs=SMALL_VIT, data_fraction=0.1, epochs=1, runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"))
    grid = dict(notebook="e01_baseline_resnet50", parameters=fixed, vary=dict(student=["resnet5", "vit_tiny_patch16_224"]))
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump([grid]))
    for _ in range(2):
        failed, done = run_batch(tmp_path / "grid.yaml", out=tmp_path / "out")
        assert "unknown model 'resnet5'" in failed.state and done.state == "done"
        assert "1 done, 1 failed, 0 running, 0 left" in capsys.readouterr().out
    assert len(find_runs(tmp_path / "runs")) == 1
    assert "is done already" in (tmp_path / "out/grid/001-e01_baseline_resnet50.ipynb").read_text()

