"""Analysis notebooks on runs that are written here, and on none."""
import json

import numpy as np
import pandas as pd
import pytest

from test_notebooks import execute, said
from vitdistill.config import Config, config_hash, run_name, save


@pytest.mark.slow
def test_paper_analysis_without_runs_says_so(tmp_path):
    notebook = execute("a01_paper", tmp_path / "a01.ipynb", reports=str(tmp_path / "none"),
                       out=str(tmp_path / "out"))
    assert f"No runs in {tmp_path / 'none'}: only what was published is shown" in said(notebook)
    assert (tmp_path / "out/index.html").is_file() and (tmp_path / "out/figures/figure4.png").is_file()


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
