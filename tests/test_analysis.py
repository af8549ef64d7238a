"""Analysis notebooks on runs that are written here, on none, and on those that are committed."""
import collections
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, record
from scipy.stats import linregress

from test_notebooks import definitions, execute, said
from vitdistill.cli import analysis_parameters
from vitdistill.base import shipped_names
from vitdistill.config import Config, preset
from vitdistill.runs import Run, find_runs
from vitdistill.launch.studies import Study
from vitdistill.study.compare import Comparison, draw_curves, draw_forest, load_comparison
from vitdistill.study.figures import content_hash, is_unchanged
from vitdistill.study.trends import EXPONENTIAL, LOG, POWER, Trend, bootstrap, fit, plateau, smooth_lead

FIGURES = {name: analysis_parameters(name, "reports/runs", "reports")
           for name in sorted(shipped_names("nbs/analysis", ".ipynb"))}  # as `make figures` gives them


@functools.cache
def tracked():
    """What is committed of reports/ that a notebook writes, by its path in there."""
    command = ["git", "ls-files", "reports"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [name.removeprefix("reports/") for name in names.split()]
    return {path for path in paths if re.match(r"(figures|tables)/", path)}


def same_as_committed(out):
    """Every table and SVG that a notebook wrote agrees with the committed one; SVGs where matplotlib is the
    pinned."""
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
    assert same_as_committed(rebuilt(name))


EXTENSIONS = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
WIDE = [name for name in EXTENSIONS if re.search("512|V4", name)]
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
    if not told.startswith("AVX2\n"):
        pytest.skip("this processor has no AVX2")
    assert not any(wide in told.split("not found:")[0] for wide in WIDE)
    subprocess.run([sys.executable, "-m", "papermill", *notebook, "--cwd", str(ROOT), *given], check=True,
                   cwd=ROOT, env=os.environ | AVX2)
    assert same_as_committed(tmp_path / "out")


def test_every_page_of_reports_is_still_written(rebuilt):
    """What is committed is what the notebooks write today."""
    written = set()
    for name in FIGURES:
        folder = rebuilt(name)
        written |= {path.relative_to(folder).as_posix() for path in folder.glob("*s/*")}
    left = tracked() - written
    assert not left, f"no notebook writes {', '.join(sorted(left))}: git rm it"


def outputs_of(name):
    """The outputs of a committed analysis notebook, of all its cells."""
    notebook = json.loads((ROOT / f"nbs/analysis/{name}.ipynb").read_text())
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


@pytest.mark.parametrize("name", FIGURES)
def test_a_notebook_shows_the_committed_pictures(name):
    """What is read on a forge: small pictures of the SVGs in reports/, tables and text without a path or an
    error."""
    outputs = outputs_of(name)
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    assert shown and {output["output_type"] for output in outputs} <= {"display_data", "stream"}
    svgs = {content_hash(file) for file in (ROOT / "reports/figures").glob("*.svg")}
    for output in shown:
        assert output["metadata"]["image/png"]["svg"] in svgs, "it shows an older picture: run make figures"
        assert len(output["data"].pop("image/png")) <= 150_000
    assert not re.search(r"(?<![\w.])/(root|work|home|tmp|Users)/|Traceback", json.dumps(outputs))


def test_complexity_analysis(rebuilt):
    """Architectures are measured without runs or weights; what is timed is left out where it isn't asked
    for."""
    out = rebuilt("a04_complexity")
    table = pd.read_csv(out / "tables/complexity_differences.csv")
    unexplained = set(table.network[table["variant agrees"] == "no"])
    assert unexplained == {"ResNet-50"}
    heads = pd.read_csv(out / "tables/complexity_head.csv").set_index("layer")["without biases (K)"]
    millions = heads[[f"VGG-16 fc{n}" for n in (6, 7, 8)]].tolist()
    assert millions == pytest.approx([102_760, 16_777, 4_096], abs=0.5)
    stages = pd.read_csv(out / "tables/complexity_vgg.csv")
    stages = stages.pivot(index="side of the map (px)", columns="model")
    last = stages["multiply-adds of the last (M)"].loc[[28, 56, 112, 224]]
    assert set(last.to_numpy().ravel()) == {1849.688064}
    assert stages["convolutions"].sum().tolist() == [13, 16]
    rows = pd.read_csv(out / "tables/complexity_stem_layers.csv").set_index("layer").iloc[:, 1:].round()
    assert rows.loc["sum"].tolist() == [7644, 124, 481] and rows.iloc[:-1, 2].tolist() == [118, 2, 13, 347, 1]
    ratios = pd.read_csv(out / "tables/complexity_stem_ratios.csv")["of the published numbers"]
    assert ratios.round(1).tolist() == [5.7, 8.9, 17.9, 15.6]
    assert not list(out.parent.glob("*/*/complexity_seconds*"))


def curve_run(root, accuracy, seed=1, done=60, drawn=None, **over):
    """A run folder of 60 planned epochs whose test accuracy follows `accuracy(epoch)`, with noise of a
    point, of the seed `drawn` or else of the run's."""
    c = Config(dataset="digits", epochs=60, seed=seed, runs_dir=str(root), work_dir=str(root.parent / "work"),
               **over)
    epoch = np.arange(1, done + 1)
    noise = np.random.default_rng([drawn or seed, len(over)]).normal(0, 0.01, done)
    frame = pd.DataFrame(dict(epoch=epoch - 1, test_top1=accuracy(epoch) + noise))
    return record(c, "small_overtake/hard" if c.teacher else "small_overtake/plain", metrics=frame,
                  **dict(epochs=60) if done == 60 else {}).folder


def fast_curve(epoch):
    return 0.7 - 0.6 * np.exp(-epoch / 5)


def slow_curve(epoch):
    return 0.9 - 0.85 * np.exp(-epoch / 15)


def logarithm(epoch, more):
    return 0.1 + 0.15 * np.log(epoch) + more


def test_trends_analysis_says_what_is_cut_short(tmp_path):
    """Three seeds a side, one run cut short in its last line, one of another layout: drawn, and said."""
    taught = dict(experiment="distilled", teacher="vit_tiny_patch16_224", distillation="hard")
    for seed, drawn in (1, 1), (3, 4), (2, 2):  # the seeds of small_overtake
        curve_run(tmp_path / "runs", fast_curve, seed, drawn=drawn)
        done = 50 if seed == 2 else 60
        last = curve_run(tmp_path / "runs", slow_curve, seed, done=done, drawn=drawn, **taught)
    with (last / "metrics.csv").open("a") as file:
        file.write("50,0.")
    (curve_run(tmp_path / "runs", np.sqrt, seed=4) / "config.yaml").write_text("learning_rat: 1")
    text = said(execute("a03_trends", tmp_path / "a03.ipynb", reports=str(tmp_path / "runs"),
                        out=str(tmp_path / "out"), bootstraps=20))
    assert f"Cut short: {last.name} is interrupted, 50 of 60" in text
    assert "Left out: the config of baseline" in text
    for name in ("published", "plateau", "laws", "backtest", "crossover"):
        assert (tmp_path / f"out/figures/trends_{name}.svg").stat().st_size > 10_000
    fits = pd.read_csv(tmp_path / "out/tables/trends_fits.csv")
    assert set(fits.loc[fits["AICc above the best"] == 0, "law"]) == {"exponential"}
    crossings = pd.read_csv(tmp_path / "out/tables/trends_crossovers.csv")
    row = crossings[(crossings.law == "exponential") & (crossings["fitted to epochs"] == "1 to 50")].iloc[0]
    truth = next(e for e in np.arange(5, 60, 0.1) if slow_curve(e) > fast_curve(e))
    assert abs(float(row["forecast crossover"]) - truth) < 2 and abs(float(row.measured) - truth) < 4
    pairs = pd.read_csv(tmp_path / "out/tables/trends_pairs.csv").set_index("law")
    assert pairs.loc["logarithm", "plain, error"] > 5  # promised too much of a curve with a ceiling
    assert abs(pairs.loc["exponential", "plain, error"]) < 1


def test_no_crossover_is_read_off_a_pair_that_is_not_resolved(tmp_path):
    """Two arms of one law, two seeds a side: the table names no epoch, however the curves lie at the end."""
    taught = dict(experiment="distilled", teacher="vit_tiny_patch16_224", distillation="hard")
    for seed in (1, 2):
        for way in ({}, taught):
            law = functools.partial(logarithm, more=0.002 * len(way))
            curve_run(tmp_path / "runs", law, seed, done=12, **way)
    execute("a03_trends", tmp_path / "a03.ipynb", reports=str(tmp_path / "runs"), out=str(tmp_path / "out"),
            bootstraps=20)
    crossings = pd.read_csv(tmp_path / "out/tables/trends_crossovers.csv")
    assert len(crossings) and set(crossings.measured) == {"the lead may be chance"}


def papers_pair(root, taught_less_plain, done=(150, 140), seeds=(1, 2, 3)):
    """Made-up runs in the paper's own size: the plain one follows a logarithm, the taught one differs by a
    constant."""
    taught = dict(experiment="distilled", teacher="vit_tiny_patch16_224", distillation="hard")
    for seed in seeds:
        for way, more, n in (({}, 0.0, done[0]), (taught, taught_less_plain, done[1])):
            c = Config(dataset="cifar100", student="resnet50", val_fraction=0.0, epochs=150, t_max=2000,
                       seed=seed, runs_dir=str(root), work_dir=str(root.parent / "work"), **way)
            epoch = np.arange(1, n + 1)
            noise = np.random.default_rng(seed + len(way)).normal(0, 0.003, n)
            top1 = 0.05 + 0.1 * np.log(epoch) + more + noise
            frame = pd.DataFrame(dict(epoch=epoch - 1, test_top1=top1, seconds=1.0, teacher_seconds=0.5))
            record(c, "small_overtake/hard" if way else "small_overtake/plain", metrics=frame)


def test_figure4_on_the_papers_axes(tmp_path):
    """Both laws over the epochs that both arms have; the crossover; Table 1 to the letter, or why not. A
    longer pair is on the digits, as fewer runs are, and is left out."""
    papers_pair(tmp_path / "runs", -0.03)
    for arm, way in dict(plain={}, taught=TAUGHT).items():
        config = Config(dataset="digits", epochs=400, runs_dir=str(tmp_path / "runs"), **way)
        long = pd.DataFrame(dict(epoch=range(400), test_top1=0.5, seconds=7.0, teacher_seconds=0.0))
        record(config, f"digits/{arm}", metrics=long, test_top1=0.5)
    (curve_run(tmp_path / "runs", lambda e: 0.5) / "arms.json").unlink()  # of no study: not in the figure
    execute("a01_paper", tmp_path / "a01.ipynb", reports=str(tmp_path / "runs"), out=str(tmp_path / "out"))
    drawing = (tmp_path / "out/figures/figure4.svg").read_text()
    assert "trendlines to epoch 200" in drawing  # beyond the data
    timing = pd.read_csv(tmp_path / "out/tables/timing.csv").set_index("seconds per epoch")
    assert not (timing["measured, mean"] == 7).any()
    laws = pd.read_csv(tmp_path / "out/tables/trendlines.csv").set_index("curve")
    assert (laws.loc[["baseline, measured", "distilled, measured"], "fitted to epochs"] == "1 to 140").all()
    assert laws.loc["baseline, published", "R²"] == 0.662 and laws.loc["distilled, published", "R²"] == 0.962
    assert all(f"{b} ln(epoch)" in laws.loc[f"{arm}, measured", "law"]
               for arm, b in (("baseline", "0.1"), ("distilled", "0.1")))
    crossings = pd.read_csv(tmp_path / "out/tables/crossovers.csv").answer
    meets = float(re.match(r"epoch ([\d.]+), extrapolated", crossings[1])[1])
    assert meets == pytest.approx(140 * np.exp(0.03 / 0.1), rel=0.03)
    assert crossings[0].startswith("epoch 397.7")
    rows = pd.read_csv(tmp_path / "out/tables/table1.csv", keep_default_na=False).set_index("hyper-parameter")
    assert (rows["as published"] != "").all()
    assert {"student", "training images", "epochs run"} <= set(rows.index)
    explained = set(rows.index[rows["as published"] != "yes"])
    assert explained == {"stem", "teacher", "epochs run", "epochs (planned)", "seed", "criterion",
                         "num workers", "T_max"}


@pytest.mark.slow
@pytest.mark.parametrize("name, told", [
    ("a01_paper", "only what was published is shown"), ("a03_trends", "only what was published is shown")])
def test_analysis_without_records_says_so(name, told, tmp_path):
    none = str(tmp_path / "none")
    assert told in said(execute(name, tmp_path / "a.ipynb", out=str(tmp_path / "out"), reports=none))


@pytest.mark.slow
def test_an_unfinished_arm_with_predictions_stops_no_report(tmp_path):
    """All seeds of an arm have predictions of their last epoch and no result: a row over test images, without
    seeds."""
    committed = ROOT / "reports/runs"
    cut = {run.name for run in load_comparison("setting_a", find_runs(committed)).arms["hard labels"]}
    (tmp_path / "runs").mkdir()
    for place in committed.iterdir():
        if place.name not in cut:
            (tmp_path / "runs" / place.name).symlink_to(place)
            continue
        shutil.copytree(place, here := tmp_path / "runs" / place.name)
        (here / "result.json").unlink()
        (here / "predictions.npz").rename(here / f"predictions-{Run(here).epochs_done}.npz")
    (tmp_path / "bench").symlink_to(ROOT / "reports/bench")
    table = load_comparison("setting_a", find_runs(tmp_path / "runs")).table().set_index(["arm", "other"])
    assert table.seeds["hard labels", "plain"] == 0
    assert table.interval["hard labels", "plain"] == "test images"
    execute("a02_study", tmp_path / "a02.ipynb", reports=str(tmp_path / "runs"), out=str(tmp_path / "out"))
    taught = pd.read_csv(tmp_path / "out/tables/study_teachers.csv").arm
    assert "hard labels" not in set(taught) and "hard labels, out of fold" in set(taught)


@pytest.mark.slow
def test_figure4_of_a_pair_that_has_just_begun(tmp_path):
    """Two epochs and one: drawn, without laws; nothing is read off them."""
    papers_pair(tmp_path / "runs", 0.0, (2, 1), (1,))
    text = said(execute("a01_paper", tmp_path / "a01.ipynb", reports=str(tmp_path / "runs"),
                        out=str(tmp_path / "out")))
    assert "the logarithm needs 3 epochs, this curve has 1" in text
    assert len(pd.read_csv(tmp_path / "out/tables/crossovers.csv")) == 1  # the published one
    assert "1 of 150 epochs" in (tmp_path / "out/figures/figure4.svg").read_text()


STUDY = definitions("a02_study")
CAN = definitions("a08_can", "PROBES", "TUNED")
TRENDS = definitions("a03_trends")
TAUGHT = dict(experiment="distilled", teacher="vit_tiny_patch16_224", distillation="hard")
LAW = 0.1 + 0.1 * np.log(np.arange(1, 151))


def curve_arm(root, curve, seeds=(1,), planned=None, right=100, **over):
    """Runs of an arm with these test accuracies by epoch; ended, with decisions, if they have all planned
    epochs."""
    runs = []
    for seed in seeds:
        c = Config(dataset="digits", epochs=planned or len(curve), seed=seed, runs_dir=str(root), **over)
        frame = pd.DataFrame(dict(epoch=range(len(curve)), test_top1=curve, train_top1=np.add(curve, 0.1)))
        ended = {} if planned else dict(test_top1=float(curve[-1]), train_top1=float(curve[-1]) + 0.1)
        run = record(c, metrics=frame, **ended)
        decisions = np.repeat([0, 1], [right, 200 - right])
        run.save_predictions(test_image=np.arange(200), test_label=np.zeros(200, int),
                             train_image=np.arange(90), test_class_decision=decisions,
                             test_class_confidence=np.full(200, 0.5, "float16"))
        runs.append(run)
    return runs


def test_long_runs_are_compared_as_far_as_both_have_come(tmp_path):
    """Means of ten epochs; an arm on the published law is as far from it as the law was shifted."""
    plain = curve_arm(tmp_path, LAW[:90], planned=150)
    taught = curve_arm(tmp_path, LAW[:25] / 2, planned=150, **TAUGHT)
    course = STUDY.course_rows(dict(long=(plain, taught)), half=0.03)
    assert course.epochs.tolist() == ["1 to 10", "11 to 20", "21 to 25"]
    np.testing.assert_allclose(course.difference + course.plain / 2, 0, atol=1e-9)
    np.testing.assert_allclose((course.high - course.low)[:2], 0.06)
    assert np.isnan(course.high.iloc[-1])  # of five epochs, which scatter more than ten
    other = curve_arm(tmp_path / "other", LAW[:60], planned=150)
    arms = dict(plain=plain, other=other, taught=taught)
    table = STUDY.long_rows(arms, lambda epoch: 0.15 + 0.1 * np.log(epoch))
    assert table.epochs_done.tolist() == [60, 60, 25] and table.line_rms[:2].tolist() == [0.05] * 2


def test_overfitting_is_the_gap_of_training_and_test(tmp_path):
    both = dict(plain=curve_arm(tmp_path, (0.2, 0.5), (1, 2)),
                taught=curve_arm(tmp_path, (0.2, 0.53), (1, 2), **TAUGHT))
    study = Study("mine", arms=dict.fromkeys(both, {}), baseline="plain")
    row = STUDY.overfit_rows(Comparison(study, both)).iloc[0]
    assert [row.gap, row.gap_other, row.difference] == pytest.approx([0.1, 0.1, 0])  # 10 points for both


def test_costs_are_counted_and_timed_by_a_bench(tmp_path):
    """90 images in two epochs: steps, answers, expected passes with a memo of 81 views, minutes at a bench's
    rates."""
    rates = {"vitdistill plain": 3.0, "vitdistill full memo": 2.0, "teacher alone": 1.0}
    pd.Series(rates, name="images_per_second").rename_axis("contender").to_csv(tmp_path / "machine.csv")
    (tmp_path / "machine.txt").write_text("a machine, 2 cores, torch 2")
    (tmp_path / "machine-recipe.txt").write_text("another bench")
    assert STUDY.read_rates(tmp_path) == (rates, "a machine, 2 cores")
    timed, curve = (TAUGHT["teacher"], Config().teacher_size), (0.2, 0.5)
    arms = dict(plain=curve_arm(tmp_path / "runs", curve),
                taught=curve_arm(tmp_path / "runs", curve, (1, 2, 3), **TAUGHT),
                thrice=curve_arm(tmp_path / "runs", curve, repeats=3, repeats_mode="longer"))
    costs = STUDY.cost_rows(arms, rates, timed).set_index("arm")
    assert costs.steps.tolist() == [2, 2, 6] and costs.online.tolist() == costs.heard.tolist() == [0, 180, 0]
    assert costs.memo["taught"] == pytest.approx(90 * (2 - 1 / 81), abs=1)
    assert costs.shared["taught"] == pytest.approx(90 * 81 * (1 - (80 / 81) ** 6) / 3, abs=1)  # three seeds
    assert costs["minutes, online"].tolist() == [1, 4, 3]  # 180 images, and as many passes; 540 images
    of_another = STUDY.cost_rows(arms, rates, ("another", 9))
    assert of_another["minutes, memo"].isna().tolist() == [False, True, False]


def test_calibration_of_runs_that_are_half_sure(tmp_path):
    half = []
    for seed, right in (1, 100), (2, 120):
        half += curve_arm(tmp_path, (0.2, right / 200), [seed], right=right)
    row = STUDY.calibration_rows(dict(half=half, none=[])).iloc[0]
    expected = [0.05, np.std([0, 0.1], ddof=1), 0.5]
    assert [row.ece, row.ece_std, row.confidence] == pytest.approx(expected, abs=1e-4)


VIT = dict(dataset="digits", student="vit_tiny_patch16_224", student_kwargs=dict(depth=2))
SIMCLR = dict(mask=0.0, sigma=0.0, weights=[1.0, 0.0, 0.0])
MAE = dict(views=1, mask=0.75, sigma=0.0, weights=[0.0, 1.0, 0.0])


def pretraining(seed=1, epochs=30, lr=0.1, **given):
    where = given.pop("runs_dir", "")
    return Config(**VIT, experiment="pretrain", distillation="can", objective_kwargs=given, seed=seed,
                  epochs=epochs, lr=lr, runs_dir=where)


def test_passes_and_patches_of_pretrainings():
    for config in pretraining(), pretraining(epochs=60, **MAE), Config(epochs=60):
        assert CAN.passes(config) == 60
    quarter = dict(dataset="digits", student=VIT["student"], student_kwargs=dict(img_size=32, patch_size=4))
    ways = ("can", {}), ("can", SIMCLR), ("can", MAE), ("none", {})
    configs = [Config(**quarter, distillation=way, objective_kwargs=given) for way, given in ways]
    seen = [CAN.seen_patches(config) for config in configs]
    assert seen == [32, 64, 16, 64]  # of 8 x 8


def test_multiply_adds_of_a_view_by_hand():
    def block(tokens, width):  # of a transformer
        return 12 * tokens * width**2 + 2 * tokens**2 * width
    encoder = 64 * 48 * 192 + 4 * block(32, 192)  # all patches are embedded, half are seen
    projector = 192 * 512 + 512 * 128
    decoder = 32 * 192 * 96 + 2 * block(64, 96) + 64 * 96 * 48 + 2 * 96**2  # the last: of sigma
    assert CAN.view_cost(preset("can", "pretrain")) == encoder + projector + decoder


def test_noise_explained_is_a_share_of_its_variance(tmp_path):
    def explained(error, **given):
        config = pretraining(runs_dir=str(tmp_path), **given)
        return CAN.noise_explained(record(config, train_denoising=error))
    assert [explained(0.03, sigma=0.3), explained(0.015, sigma=0.3)] == pytest.approx([0, 0.5])
    by_patch = explained(0.49, sigma=0.3, normalize_noise=True)  # noise of variance 1
    assert by_patch == pytest.approx(0.5, abs=0.01)
    assert np.isnan(explained(0.2, **SIMCLR))


def test_rows_of_pretrainings(tmp_path):
    """Means and deviations over seeds; a model from labels has no probe and no hours; further numbers
    beside."""
    for seed in 1, 2, 3:
        for arm, top1, given in ("CAN", 0.6 + 0.01 * seed, {}), ("SimCLR", 0.55 + 0.012 * seed, SIMCLR):
            record(pretraining(seed, runs_dir=str(tmp_path), **given), f"mine/{arm}", linear_val_top1=top1,
                   linear_test_top1=top1 - 0.05, seconds=3600 * seed)
    for arm, top1, more in ("tuned", 0.7, dict(layer_decay=0.75)), ("scratch", 0.5, {}):
        config = Config(**VIT, **more, experiment="teacher", runs_dir=str(tmp_path))
        record(config, f"mine/{arm}", held_out_top1=top1, test_top1=top1 - 0.01, seconds=9)
    (tmp_path / "mine.yaml").write_text("""
measure: linear_test_top1
seeds: [1, 2, 3]
arms:
  CAN: {notebook: e06_pretrain}
  SimCLR: {notebook: e06_pretrain, epochs: 30}
  tuned: {notebook: e00_teacher}
  scratch: {notebook: e00_teacher, layer_decay: 1.0}
compare: [[CAN, SimCLR], [tuned, scratch]]
""")
    mine = load_comparison(tmp_path / "mine.yaml", tmp_path)
    encoders = {arm: mine.arms[arm] for arm in ("CAN", "SimCLR")}
    tuned = dict(CAN=mine.arms["tuned"], scratch=mine.arms["scratch"])
    table = CAN.arm_rows(encoders, tuned).set_index("arm")
    can = table.loc["CAN", ["linear probe, test", "fine-tuned, test", "hours", "passes"]]
    assert can.tolist() == ["0.57 ± 0.01", "0.69", "2 ± 1", 60]
    assert [*table.index] == ["CAN", "SimCLR", "scratch"]
    scratch = table.loc["scratch", ["fine-tuned, held out", "linear probe, test", "hours"]]
    assert scratch.tolist() == ["0.5", "", ""]
    costs = CAN.cost_rows(encoders | dict(MAE=[])).set_index("arm")
    assert costs.hours.tolist() == ["2 ± 1"] * 2 and costs["hours over CAN"].tolist() == [1, 1]
    assert costs["multiply-adds over CAN"].iloc[0] == 1
    rows = CAN.table_with(mine, held_out="linear_val_top1", tuned="held_out_top1").set_index("arm")
    assert rows.difference["CAN"] == rows.held_out["CAN"] == pytest.approx(0.046) and rows.low["CAN"] > 0
    assert [*rows.index] == ["CAN"] and np.isnan(rows.tuned["CAN"])


def test_claims_of_captions(tmp_path):
    """Best at a factor of 0.3, and half of the gap closed, over the seeds that all arms have."""
    capdec = definitions("a09_capdec", "MEASURES")
    none = "noise noise_factor=0.0"
    known = {0.0: 0.2, 0.1: 0.38, 0.3: 0.5, 1.0: 0.49, 3.0: 0.48, 10.0: 0.1}  # factor -> accuracy
    base = dict(experiment="captions", clip="own", dataset="digits", runs_dir=str(tmp_path))
    for seed in 1, 2, 3:
        for factor, top1 in known.items():
            by_rule = dict(noise_std=0.2 * factor, noise_rule=0.2, noise_rule_draws=[0.18, 0.2, 0.22])
            if seed == 2 and factor == 3.0:  # a run that was added later asks CapDec's rule too
                by_rule |= dict(caption_rule=0.06, caption_rule_draws=[0.02, 0.06])
            right = round(top1 + 0.001 * seed * (1 + factor), 6)
            record(Config(**base, noise_factor=factor, seed=seed), "mine/noise", **by_rule, test_top1=right,
                   val_top1=top1 + 0.01, test_text_top1=0.9, test_word=0.1, image_bleu=20.0)
        from_images = Config(**base, learn_from="image", seed=seed)
        record(from_images, "mine/images", test_top1=0.8 + 0.001 * seed, val_top1=0.8)
    (tmp_path / "mine.yaml").write_text("""
seeds: [1, 2, 3]
arms:
  noise: {notebook: e09_captions, vary: {noise_factor: [0.0, 0.1, 0.3, 1.0, 3.0, 10.0]}}
  images: {notebook: e09_captions, learn_from: image}
baseline: noise noise_factor=0.0
choose: {field: noise_factor, by: val_top1}
""")
    mine = load_comparison(tmp_path / "mine.yaml", tmp_path)
    uneven = load_comparison(tmp_path / "mine.yaml", [run for arm, runs in mine.arms.items() for run in runs
                                           if arm == none or run.config.seed < 3])
    of_both = (0.50195 - 0.2015) / (0.8015 - 0.2015)  # seeds 1 and 2, which all three arms have
    assert capdec.gap_closed(uneven, "noise noise_factor=0.3", "images") == pytest.approx(of_both)
    table = capdec.caption_rows(mine, "images").set_index("arm")
    closed = (0.5026 - 0.202) / (0.802 - 0.202)
    assert table.gap_closed["noise noise_factor=0.3"] == pytest.approx(closed, abs=1e-3)
    assert table.gap_closed[[none, "images"]].tolist() == pytest.approx([0, 1])
    claims = pd.DataFrame([*capdec.gap_claims(mine, "images"), *capdec.rule_claims(mine)])
    assert claims.claim[~claims.met].tolist() == ["g"]
    assert claims.value[4] == pytest.approx((0.51 - 0.39) / 2)  # factors 0.1 and 0.3
    assert claims.low[2] < claims.value[2] < claims.high[2]  # over seeds
    assert claims.value[0] == pytest.approx(0.9 - 0.202, abs=1e-3)
    assert claims.value[3] == pytest.approx(0.0102, abs=2e-3)
def test_a_comparison_opens_each_file_of_a_run_once():
    """Also of a study with one seed, which compares the predictions of one arm with those of all others."""
    opened = collections.Counter()
    watched = "config.yaml", "environment.json", "result.json", "predictions.npz"
    listening = True
    read = set()

    def listen(event, details):
        asked = listening and event == "open" and str(details[0]).endswith(watched)
        if asked and os.path.exists(details[0]):  # a run that goes on may be asked again for its result
            opened[str(details[0])] += 1

    sys.addaudithook(listen)
    try:
        runs = find_runs("reports/runs")
        for study in ("setting_a", "deit_table8"):
            comparison = load_comparison(study, runs)
            assert len(comparison.table()) > 3
            read |= {os.path.abspath(run.folder / "result.json") for arm in comparison.arms.values()
                     for run in arm}
            comparison.accuracies()
            for draw in (draw_forest, draw_curves):
                matplotlib.pyplot.close(draw(comparison))
    finally:
        listening = False
    assert read <= set(map(os.path.abspath, opened))
    assert {*opened.values()} == {1}, opened.most_common(3)
    assert any(name.endswith("predictions.npz") for name in opened)


EPOCHS = np.arange(1, 151)
NOISE = np.random.default_rng(0).normal(0, 0.01, 150)
BENDING = pd.Series(EXPONENTIAL(EPOCHS, (0.72, 0.6, 30)) + NOISE, EPOCHS)


def test_an_interval_of_crossovers_is_that_of_simulated_curves():
    """Of a fitted logarithm that meets a plateau; `inf` where half of the refits never meet it."""
    line = 0.139 * np.log(EPOCHS) - 0.112

    def fitted(seed):
        return fit(LOG, EPOCHS, line + np.random.default_rng(seed).normal(0, 0.06, 150))
    refits = bootstrap(fitted(0), np.random.default_rng(0))
    low, high = TRENDS.crossover_interval([plateau(0.72)] * 200, refits)
    bounds = np.quantile([fitted(seed).epoch_of(0.72) for seed in range(200)], [0.025, 0.975])
    assert np.log(high / low) == pytest.approx(np.log(bounds[1] / bounds[0]), abs=0.1)
    assert TRENDS.crossover_interval([plateau(0.9)] * 9, [plateau(0.8)] * 9).tolist() == [math.inf] * 2
    some = [plateau(level) for level in (0.4, 0.4, 0.6, 0.6)]
    assert TRENDS.crossover_interval([plateau(0.5)] * 4, some).tolist() == [1, math.inf]


def test_a_measured_crossover_is_the_first_epoch_of_a_lasting_lead():
    slow, fast = (pd.Series(Trend(LOG, shape)(EPOCHS), EPOCHS) for shape in ((0.1, 0.15), (0.4, 0.05)))
    measured, dip = TRENDS.measured_crossover, pd.Series([-1, 1, 1, -0.5, 1, 1], index=range(1, 7))
    assert measured(slow - fast) == math.ceil(math.exp((0.4 - 0.1) / (0.15 - 0.05)))
    assert measured(fast - slow) is None and measured(slow - slow) is None
    assert measured(smooth_lead(slow, slow + 0.1)) == 1 and measured(smooth_lead(slow[:0], slow)) is None
    # one bad epoch counts, until it is averaged
    assert [measured(smooth_lead(0 * dip, dip, window)) for window in (1, 3)] == [5, 2]
    assert measured(smooth_lead(0 * dip, dip[:3], 1)) == 2  # only epochs that both have


def test_a_back_test_forecasts_the_last_epoch():
    """The right law errs by little more than the noise; a logarithm promises too much below a ceiling."""
    tests = TRENDS.back_test(BENDING)
    late = tests[tests.k > 50].groupby("law").error.mean()
    assert abs(late["exponential"]) < 0.01 < 0.03 < late["logarithm"]
    k = tests.k[tests.k <= 75].max()
    line = linregress(np.log(EPOCHS[:k]), BENDING.iloc[:k])
    error, = tests[(tests.law == LOG.name) & (tests.k == k)].error
    assert error == pytest.approx(line.intercept + line.slope * math.log(150) - BENDING[150], abs=1e-9)
    assert TRENDS.back_test(BENDING[:62]).k.unique().tolist() == [*range(2, 62)]
    short = TRENDS.back_test(BENDING[:4])
    assert (len(short), short.error.notna().sum()) == (8, 1)  # the others have too few epochs
    assert [len(TRENDS.back_test(BENDING[:n])) for n in (0, 1, 2)] == [0, 0, 0]
    exact = TRENDS.back_test(pd.Series(POWER(EPOCHS, (0.9, 0.8, 0.5)), EPOCHS)).dropna()
    exact = exact[exact.law == POWER.name]
    assert len(exact) > 30 and exact.error.abs().max() < 1e-3
    assert np.isnan(TRENDS.fit_early(EXPONENTIAL, BENDING, 2)(150))
    assert TRENDS.fit_early(LOG, BENDING, 75).n == 75
    straight = pd.Series(0.1 + 0.1 * np.log(EPOCHS), EPOCHS)
    flat = straight.clip(upper=straight[100])  # from epoch 100 on
    errors = [TRENDS.forecast_error(LOG, curve, 3 / 8) for curve in (straight, flat)]
    assert errors == pytest.approx([0, 0.1 * np.log(1.5)], abs=1e-4)


def test_groups_explain_as_much_variance_as_a_regression_on_them():
    explained, rng = TRENDS.share_explained, np.random.default_rng(0)
    groups, values = rng.integers(0, 3, 60), rng.normal(0, 1, 60)
    x = np.column_stack([groups == group for group in range(3)]).astype(float)
    left = ((values - x @ np.linalg.lstsq(x, values, rcond=None)[0]) ** 2).sum()
    assert explained(values, groups) == pytest.approx(1 - left / 57 / (values.var() * 60 / 59))
    assert explained(groups * 2.0, groups) == pytest.approx(1)  # the group is all
    chance = [explained(rng.normal(0, 1, 40), rng.integers(0, 8, 40)) for _ in range(200)]
    assert abs(np.mean(chance)) < 3 * np.std(chance) / math.sqrt(200)  # eight groups explain nothing
    for values, groups in ([1, 2], "ab"), ([1, 2, 3], "aaa"), ([2, 2, 2], "aab"):
        assert math.isnan(explained(values, groups))
