"""Analysis notebooks on runs that are written here, and on none."""
import json

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from test_notebooks import execute, said
from vitdistill.config import Config, config_hash, run_name, save


@pytest.mark.slow
def test_paper_analysis_without_runs_says_so(tmp_path):
    notebook = execute("a01_paper", tmp_path / "a01.ipynb", reports=str(tmp_path / "none"),
                       out=str(tmp_path / "out"))
    assert f"No runs in {tmp_path / 'none'}: only what was published is shown" in said(notebook)
    assert (tmp_path / "out/index.html").is_file() and (tmp_path / "out/figures/figure4.png").is_file()


def test_study_page_without_runs_says_so(tmp_path):
    execute("a02_study", tmp_path / "a02.ipynb", reports=str(tmp_path / "none"), out=str(tmp_path))
    assert f"No finished runs on cifar100 in {tmp_path / 'none'}" in (tmp_path / "study.md").read_text()


def test_committed_study_page_is_what_its_runs_say(tmp_path):
    """`make figures` would write the page that is committed; lines of laws, whose last digit may differ, aside."""
    execute("a02_study", tmp_path / "a02.ipynb", reports="reports/runs", out=str(tmp_path))
    fitted = ("logarithm", "exponential", "logistic", "power law", "trendline")
    lines = lambda page: [line for line in page.read_text().splitlines() if not any(law in line for law in fitted)]
    assert lines(tmp_path / "study.md") == lines(ROOT / "reports/study.md") and len(lines(tmp_path / "study.md")) > 20


def test_study_chooses_by_held_out_images(tmp_path):
    """Of two learning rates the better on held-out images is chosen, whatever test images say; neither is an arm."""
    for lr, held_out, test in (0.01, 0.4, 0.1), (0.1, 0.3, 0.9):
        folder = curve_run(tmp_path / "runs", lambda e: 0.5, lr=lr)
        result = json.loads((folder / "result.json").read_text())
        result |= dict(val_top1=held_out, test_top1=test, train_top1=0.5)
        (folder / "result.json").write_text(json.dumps(result))
    execute("a02_study", tmp_path / "a02.ipynb", reports=str(tmp_path / "runs"), out=str(tmp_path),
            dataset="digits")
    choices = pd.read_csv(tmp_path / "tables/study_choices.csv").set_index("lr")
    assert choices.chosen.to_dict() == {0.01: "yes", 0.1: "no"}
    assert not len(pd.read_csv(tmp_path / "tables/study_arms.csv"))
    page = (tmp_path / "study.md").read_text()
    assert ("learning rate 0.01 of 0.01, 0.1 (40.0% of them right; seeds: 1); "
            "not varied: weight decay 0.0005, batch 128") in page
    assert "90.0%" not in page


def test_study_tells_smoothed_labels_from_a_teacher(tmp_path):
    """Smoothed labels are an arm of their own, and a taught arm above *labels alone* is held against them too."""
    taught = dict(experiment="distilled", teacher="vit_tiny_patch16_224", distillation="hard")
    for top1, spread, way in (0.5, 0, {}), (0.6, 0.001, dict(label_smoothing=0.1)), (0.8, 0.003, taught):
        for seed in 1, 2, 3:
            folder = curve_run(tmp_path / "runs", lambda e: top1 + 0 * e, seed, t_max=0, **way)
            result = json.loads((folder / "result.json").read_text())
            result |= dict(test_top1=top1 + seed * spread, train_top1=0.9)
            (folder / "result.json").write_text(json.dumps(result))
    execute("a02_study", tmp_path / "a02.ipynb", reports=str(tmp_path / "runs"), out=str(tmp_path),
            dataset="digits")
    page, pairs = (tmp_path / "study.md").read_text(), pd.read_csv(tmp_path / "tables/study_pairs.csv")
    assert pairs.arm.tolist() == ["taught"] and pairs.difference.tolist() == pytest.approx([0.306])
    assert "less *labels alone*: +10.2 points" in page
    assert "above *labels alone*, less *labels alone, labels smoothed by 0.1*: +20.4 points" in page
    assert "Without a teacher, labels smoothed by 0.1" in page


def test_data_analysis(tmp_path):
    """Every picture of the data is of the digits, and the counted views are those of the formula."""
    execute("a00_data", tmp_path / "a00.ipynb", out=str(tmp_path / "out"))
    drawn = {path.stem for path in (tmp_path / "out/figures").iterdir()}
    assert drawn == {f"data_{name}" for name in ("digits", "memo", "plan", "two_sizes", "views")}
    counts = pd.read_csv(tmp_path / "out/tables/data_view_counts.csv")
    assert {81, 162} <= set(counts.select_dtypes("number").to_numpy().ravel())


def test_complexity_analysis(tmp_path):
    """Architectures are measured without runs or weights; what is timed is left out where it isn't asked for."""
    execute("a04_complexity", tmp_path / "a04.ipynb", out=str(tmp_path / "out"), measure=False)
    drawn = {path.stem for path in (tmp_path / "out/figures").iterdir()}
    assert drawn == {f"complexity_{name}" for name in ("alexnet_vgg", "attention", "differences", "models")}
    table = pd.read_csv(tmp_path / "out/tables/complexity_differences.csv")
    # the two that nothing explains
    assert set(table.network[table["variant agrees"] == "no"]) == {"GoogLeNet, to 28 px", "ResNet-50"}
    assert not list(tmp_path.glob("out/*/complexity_seconds*"))


def curve_run(root, accuracy, seed=1, done=60, **over):
    """A run folder of 60 planned epochs whose test accuracy follows `accuracy(epoch)`, with noise of a point."""
    c, epoch = Config(dataset="digits", epochs=60, seed=seed, **over), np.arange(1, done + 1)
    save(c, root / run_name(c) / "config.yaml")
    noise = np.random.default_rng(seed).normal(0, 0.01, done)
    frame = pd.DataFrame(dict(epoch=epoch - 1, test_top1=accuracy(epoch) + noise))
    frame.to_csv(root / run_name(c) / "metrics.csv", index=False)
    if done == 60:
        (root / run_name(c) / "result.json").write_text(json.dumps({"hash": config_hash(c)}))
    return root / run_name(c)


def test_trends_analysis_says_what_is_cut_short(tmp_path):
    """Two seeds a side, one run cut short in its last line, one of another layout: drawn, and said."""
    taught = dict(experiment="distilled", teacher="vit_tiny_patch16_224", distillation="hard")
    for seed in (1, 2):
        curve_run(tmp_path / "runs", lambda e: 0.7 - 0.6 * np.exp(-e / 5), seed)
        last = curve_run(tmp_path / "runs", lambda e: 0.9 - 0.85 * np.exp(-e / 15), seed, done=60 - 10 * (seed == 2),
                         **taught)
    with (last / "metrics.csv").open("a") as file:
        file.write("50,0.")
    (curve_run(tmp_path / "runs", np.sqrt, seed=3) / "config.yaml").write_text("learning_rat: 1")
    text = said(execute("a03_trends", tmp_path / "a03.ipynb", reports=str(tmp_path / "runs"),
                        out=str(tmp_path / "out")))
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
    text = said(execute("a03_trends", tmp_path / "a03.ipynb", reports=str(tmp_path / "none"),
                        out=str(tmp_path / "out")))
    assert "only what was published is shown" in text and "epoch 397.7" in text and "epoch 2,981" in text
    drawn = sorted(path.name for path in (tmp_path / "out/figures").glob("*.png"))
    assert drawn == ["trends_plateau.png", "trends_published.png"]
