"""Analysis notebooks on runs that are written here, on none, and on those that are committed."""
import functools
import json
import os
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, record

from test_notebooks import execute, said
from vitdistill.cli import analysis_parameters
from vitdistill.config import Config, shipped_names
from vitdistill.study.figures import content_hash, is_unchanged

FIGURES = {name: analysis_parameters(name, "reports/runs", "reports")
           for name in sorted(shipped_names("nbs/analysis", ".ipynb"))}  # as `make figures` gives them


@functools.cache
def tracked():
    """What is committed of reports/ that a notebook writes, by its path in there."""
    names = subprocess.run(["git", "ls-files", "reports"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [name.removeprefix("reports/") for name in names.split()]
    return {path for path in paths if re.match(r"(figures|tables)/", path)}


def same_as_committed(out):
    """Every table and SVG that a notebook wrote agrees with the committed one; SVGs where matplotlib is the pinned."""
    pinned = f"matplotlib=={matplotlib.__version__} " in (ROOT / "settings.ini").read_text()
    files = {path.relative_to(out).as_posix(): path for path in out.glob("*s/*") if path.suffix != ".png"}
    ours = {name: path for name, path in files.items() if pinned or path.suffix != ".svg"}
    differ = [name for name, path in ours.items() if name not in tracked()
              or not is_unchanged(ROOT / "reports" / name, path.read_text())]
    assert ours and not differ, f"run make figures and look at {', '.join(sorted(differ))}"
    return set(files)


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    """A function: a notebook as `make figures` runs it, once, into a folder of its own."""
    folder = tmp_path_factory.mktemp("figures")

    @functools.cache
    def build(name):
        execute(name, folder / f"{name}.ipynb", **FIGURES[name] | dict(out=str(folder / name)))
        return folder / name

    return build


@pytest.mark.parametrize("name", FIGURES)
def test_reports_are_what_their_records_say(name, rebuilt):
    assert len(same_as_committed(rebuilt(name))) > 1


WIDE = [name for name in np.show_config(mode="dicts")["SIMD Extensions"]["found"] if re.search("512|V4", name)]
AVX2 = dict(ATEN_CPU_CAPABILITY="avx2", OPENBLAS_CORETYPE="Haswell", DNNL_MAX_CPU_ISA="AVX2",
            NPY_DISABLE_CPU_FEATURES=" ".join(WIDE))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a02_study", "a03_trends"])
def test_a_processor_without_avx512_changes_no_value(name, tmp_path):
    """Libraries are told to leave the wider instructions alone, by a process of its own."""
    given = [word for key, value in (FIGURES[name] | dict(out=str(tmp_path / "out"))).items()
             for word in ("-p", key, str(value))]
    notebook = [str(ROOT / f"nbs/analysis/{name}.ipynb"), str(tmp_path / "done.ipynb")]
    features = "import numpy, torch; print(torch.backends.cpu.get_cpu_capability()); numpy.show_config()"
    told = subprocess.check_output([sys.executable, "-c", features], env=os.environ | AVX2, text=True)
    assert told.startswith("AVX2\n") and not any(wide in told.split("not found:")[0] for wide in WIDE)
    subprocess.run([sys.executable, "-m", "papermill", *notebook, "--cwd", str(ROOT), *given], check=True,
                   cwd=ROOT, env=os.environ | AVX2)
    assert len(same_as_committed(tmp_path / "out")) > 1


def test_every_page_of_reports_is_still_written(rebuilt):
    """What is committed is what the notebooks write today."""
    written = {path.relative_to(rebuilt(name)).as_posix() for name in FIGURES for path in rebuilt(name).glob("*s/*")}
    left = tracked() - written
    assert not left, f"no notebook writes {', '.join(sorted(left))}: git rm it"


def outputs_of(name):
    """The outputs of a committed analysis notebook, of all its cells."""
    notebook = json.loads((ROOT / f"nbs/analysis/{name}.ipynb").read_text())
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


@pytest.mark.parametrize("name", FIGURES)
def test_a_notebook_shows_the_committed_pictures(name):
    """What is read on a forge: small pictures of the SVGs in reports/, tables and text without a path or an error."""
    outputs = outputs_of(name)
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    assert shown and {output["output_type"] for output in outputs} <= {"display_data", "stream"}
    svgs = {content_hash(file) for file in (ROOT / "reports/figures").glob("*.svg")}
    for output in shown:
        assert output["metadata"]["image/png"]["svg"] in svgs, "it shows an older picture: run make figures"
        assert len(output["data"].pop("image/png")) <= 150_000
    assert not re.search(r"(?<![\w.])/(root|work|home|tmp|Users)/|Traceback", json.dumps(outputs))


def test_complexity_analysis(rebuilt):
    """Architectures are measured without runs or weights; what is timed is left out where it isn't asked for."""
    out = rebuilt("a04_complexity")
    table = pd.read_csv(out / "tables/complexity_differences.csv")
    assert set(table.network[table["variant agrees"] == "no"]) == {"ResNet-50"}  # the one that nothing explains
    heads = pd.read_csv(out / "tables/complexity_head.csv").set_index("layer")["without biases (K)"]
    assert heads[[f"VGG-16 fc{n}" for n in (6, 7, 8)]].tolist() == pytest.approx([102_760, 16_777, 4_096], abs=0.5)
    stages = pd.read_csv(out / "tables/complexity_vgg.csv").pivot(index="side of the map (px)", columns="model")
    assert set(stages["multiply-adds of the last (M)"].loc[[28, 56, 112, 224]].to_numpy().ravel()) == {1849.688064}
    assert stages["convolutions"].sum().tolist() == [13, 16]
    rows = pd.read_csv(out / "tables/complexity_stem_layers.csv").set_index("layer").iloc[:, 1:].round()
    assert rows.loc["sum"].tolist() == [7644, 124, 481] and rows.iloc[:-1, 2].tolist() == [118, 2, 13, 347, 1]
    ratios = pd.read_csv(out / "tables/complexity_stem_ratios.csv")["of the published numbers"]
    assert ratios.round(1).tolist() == [5.7, 8.9, 17.9, 15.6]
    assert not list(out.parent.glob("*/*/complexity_seconds*"))


def curve_run(root, accuracy, seed=1, done=60, **over):
    """A run folder of 60 planned epochs whose test accuracy follows `accuracy(epoch)`, with noise of a point."""
    c = Config(dataset="digits", epochs=60, seed=seed, runs_dir=str(root), work_dir=str(root.parent / "work"), **over)
    epoch, noise = np.arange(1, done + 1), np.random.default_rng([seed, len(over)]).normal(0, 0.01, done)
    frame = pd.DataFrame(dict(epoch=epoch - 1, test_top1=accuracy(epoch) + noise))
    return record(c, "pair/taught" if c.teacher else "pair/plain", metrics=frame,
                  **dict(epochs=60) if done == 60 else {}).folder


def test_trends_analysis_says_what_is_cut_short(tmp_path):
    """Three seeds a side, one run cut short in its last line, one of another layout: drawn, and said."""
    taught = dict(experiment="distilled", teacher="vit_tiny_patch16_224", distillation="hard")
    for seed in (1, 4, 2):
        curve_run(tmp_path / "runs", lambda e: 0.7 - 0.6 * np.exp(-e / 5), seed)
        last = curve_run(tmp_path / "runs", lambda e: 0.9 - 0.85 * np.exp(-e / 15), seed, done=60 - 10 * (seed == 2),
                         **taught)
    with (last / "metrics.csv").open("a") as file:
        file.write("50,0.")
    (curve_run(tmp_path / "runs", np.sqrt, seed=3) / "config.yaml").write_text("learning_rat: 1")
    text = said(execute("a03_trends", tmp_path / "a03.ipynb", reports=str(tmp_path / "runs"),
                        out=str(tmp_path / "out"), bootstraps=20))
    assert f"Cut short: {last.name} is interrupted, 50 of 60" in text and "Left out: the config of baseline" in text
    for name in ("published", "plateau", "laws", "backtest", "crossover"):
        assert (tmp_path / f"out/figures/trends_{name}.svg").stat().st_size > 10_000
    fits = pd.read_csv(tmp_path / "out/tables/trends_fits.csv")
    assert set(fits.loc[fits["AICc above the best"] == 0, "law"]) == {"exponential"}
    crossings = pd.read_csv(tmp_path / "out/tables/trends_crossovers.csv")
    row = crossings[(crossings.law == "exponential") & (crossings["fitted to epochs"] == "1 to 50")].iloc[0]
    truth = next(e for e in np.arange(5, 60, 0.1) if 0.9 - 0.85 * np.exp(-e / 15) > 0.7 - 0.6 * np.exp(-e / 5))
    assert abs(float(row["forecast crossover"]) - truth) < 2 and abs(float(row.measured) - truth) < 4
    pairs = pd.read_csv(tmp_path / "out/tables/trends_pairs.csv").set_index("law")
    assert pairs.loc["logarithm", "plain, error"] > 5  # promised too much of a curve with a ceiling
    assert abs(pairs.loc["exponential", "plain, error"]) < 1


def test_no_crossover_is_read_off_a_pair_that_is_not_resolved(tmp_path):
    """Two arms of one law, two seeds a side: the table names no epoch, however the curves lie at the end."""
    taught = dict(experiment="distilled", teacher="vit_tiny_patch16_224", distillation="hard")
    for seed in (1, 2):
        for way in ({}, taught):
            curve_run(tmp_path / "runs", lambda e: 0.1 + 0.15 * np.log(e) + 0.002 * len(way), seed, done=12, **way)
    execute("a03_trends", tmp_path / "a03.ipynb", reports=str(tmp_path / "runs"), out=str(tmp_path / "out"),
            bootstraps=20)
    crossings = pd.read_csv(tmp_path / "out/tables/trends_crossovers.csv")
    assert len(crossings) and set(crossings.measured) == {"the lead may be chance"}


def papers_pair(root, taught_less_plain, done=(150, 140), seeds=(1, 2, 3)):
    """Made-up runs in the paper's own size: the plain one follows a logarithm, the taught one differs by a constant."""
    taught = dict(experiment="distilled", teacher="vit_tiny_patch16_224", distillation="hard")
    for seed in seeds:
        for way, more, n in (({}, 0.0, done[0]), (taught, taught_less_plain, done[1])):
            c = Config(dataset="cifar100", student="resnet50", val_fraction=0.0, epochs=150, t_max=2000, seed=seed,
                       runs_dir=str(root), work_dir=str(root.parent / "work"), **way)
            epoch = np.arange(1, n + 1)
            top1 = 0.05 + 0.1 * np.log(epoch) + more + np.random.default_rng(seed + len(way)).normal(0, 0.003, n)
            frame = pd.DataFrame(dict(epoch=epoch - 1, test_top1=top1, seconds=1.0, teacher_seconds=0.5))
            record(c, "pair/taught" if way else "pair/plain", metrics=frame)


def test_figure4_on_the_papers_axes(tmp_path):
    """Both laws over the epochs that both arms have; the crossover; Table 1 to the letter, or why not."""
    papers_pair(tmp_path / "runs", -0.03)
    (curve_run(tmp_path / "runs", lambda e: 0.5) / "arms.json").unlink()  # of no study: not in the figure
    execute("a01_paper", tmp_path / "a01.ipynb", reports=str(tmp_path / "runs"), out=str(tmp_path / "out"))
    assert "trendlines to epoch 200" in (tmp_path / "out/figures/figure4.svg").read_text()  # drawn beyond the data
    laws = pd.read_csv(tmp_path / "out/tables/trendlines.csv").set_index("curve")
    assert (laws.loc[["baseline, measured", "distilled, measured"], "fitted to epochs"] == "1 to 140").all()
    assert laws.loc["baseline, published", "R²"] == 0.662 and laws.loc["distilled, published", "R²"] == 0.962
    assert all(f"{b} ln(epoch)" in laws.loc[f"{arm}, measured", "law"]
               for arm, b in (("baseline", "0.1"), ("distilled", "0.1")))
    crossings = pd.read_csv(tmp_path / "out/tables/crossovers.csv").answer
    meets = float(re.match(r"epoch ([\d.]+), extrapolated", crossings[1])[1])
    assert meets == pytest.approx(140 * np.exp(0.03 / 0.1), rel=0.03) and crossings[0].startswith("epoch 397.7")
    rows = pd.read_csv(tmp_path / "out/tables/table1.csv", keep_default_na=False).set_index("hyper-parameter")
    assert (rows["as published"] != "").all() and {"student", "training images", "epochs run"} <= set(rows.index)
    explained = set(rows.index[rows["as published"] != "yes"])
    assert explained == {"teacher", "epochs run", "epochs (planned)", "seed", "criterion", "num workers", "T_max"}


@pytest.mark.slow
@pytest.mark.parametrize("name, told", [
    ("a01_paper", "only what was published is shown"), ("a03_trends", "only what was published is shown"),
    ("a05_agreement", "No finished run of a study with predictions"),
    ("a07_hilo", "only what can be counted is shown. Run make bench-attention")])
def test_analysis_without_records_says_so(name, told, tmp_path):
    where = dict(bench=str(tmp_path / "none")) if name == "a07_hilo" else dict(reports=str(tmp_path / "none"))
    assert told in said(execute(name, tmp_path / "a.ipynb", out=str(tmp_path / "out"), **where))


@pytest.mark.slow
def test_figure4_of_a_pair_that_has_just_begun(tmp_path):
    """Two epochs and one: drawn, without laws; nothing is read off them."""
    papers_pair(tmp_path / "runs", 0.0, (2, 1), (1,))
    text = said(execute("a01_paper", tmp_path / "a01.ipynb", reports=str(tmp_path / "runs"), out=str(tmp_path / "out")))
    assert "the logarithm needs 3 epochs, this curve has 1" in text
    assert len(pd.read_csv(tmp_path / "out/tables/crossovers.csv")) == 1  # the published one
    assert "1 of 150 epochs" in (tmp_path / "out/figures/figure4.svg").read_text()
