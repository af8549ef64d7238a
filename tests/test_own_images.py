"""A folder of images becomes a teacher, two students, a comparison and predictions: by command, call and
notebook."""
import contextlib
import functools
import html
import io
import json
import logging
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from matplotlib import colors
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import PYTHON, ROOT
from test_notebooks import execute, said
from test_recipes import snippet
from vitdistill import api
from vitdistill.cli import main
from vitdistill.base import VitdistillError
from vitdistill.config import Config, preset
from vitdistill.data.datasets import load_data
from vitdistill.data.files import in_folders, natural_order
from vitdistill.data.labels import IMAGES, Part, read_labels, table_rows, write_table
from vitdistill.launch.queue import grid_cells, run_cell
from vitdistill.job.folder import scan
from vitdistill.job.plan import teacher_part
from vitdistill.deploy.evaluate import evaluate
from vitdistill.deploy.predict import load_model, predict
from vitdistill.train.ranks import Ranks
from vitdistill.runs import find_run, find_runs, lock_folder
from vitdistill.train.setup import prepare, resolve
from vitdistill.study.compare import load_comparison, write_pictures
from vitdistill.study.results import read_predictions
from vitdistill.train.loop import batches, train

VIT = dict(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
SMALL = dict(student="mobilenetv3_small_050", epochs=1, image_size=32, teacher_size=32, nproc=1,
             student_pretrained=False)
pytestmark = pytest.mark.usefixtures("known_speed")  # but for the command of `job`, which measures it


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of ten noisy pictures, dark to bright."""
    folder = tmp_path_factory.mktemp("images")
    for c, name in enumerate(["dark", "grey", "light"]):
        (folder / name).mkdir()
        for i in range(10):
            pixels = np.random.default_rng([c, i]).integers(80 * c, 80 * c + 80, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def files_of(out, part, root):
    """The images of a part of a job, in the order of its runs."""
    files = [row.file for row in table_rows(out / IMAGES) if row.part == part]
    return [str(root / file) for file in sorted(files, key=natural_order)]


def test_a_folder_of_classes_is_divided_by_content(tmp_path):
    """Images keep their labels; a fifth or so of each class is for the test, and some are held out. A plain
    run on the same folder, and on the job's table, has the same test images."""
    counts = dict(ape=5, bee=10, cat=20, dog=45)
    for c, (name, n) in enumerate(counts.items()):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (9, 9), (60 * c, i, 0)).save(tmp_path / "mine" / name / f"{i}.png")
    config = Config(dataset="imagefolder", data_root=str(tmp_path / "mine"), image_size=8, val_fraction=0.25)
    images = scan(config)
    files = {str(file.relative_to(tmp_path / "mine")) for file in (tmp_path / "mine").rglob("*.png")}
    assert {row.file for row in images.rows} == files
    for n, test, held_out in zip(counts.values(), images.counts(Part.test), images.counts(Part.held_out)):
        assert max(1, 0.1 * n) <= test <= 0.5 * n and 1 <= held_out < n - test
    table = write_table(images.rows, tmp_path / "images.csv")
    plain, of_table = load_data(config), load_data(replace(config, labels=str(table)))
    for data in (plain, of_table):
        assert data.classes == [*counts]
        for part in ("train", "test"):
            pixels, labels = (getattr(data, f"{part}_{what}") for what in ("images", "labels"))
            assert (pixels[:, 4, 4, 0] // 60).tolist() == labels.tolist()
    assert torch.equal(plain.test_images, of_table.test_images)
    train, held_out = of_table.split(config)
    assert of_table.train_labels[held_out].bincount(minlength=4).tolist() == images.counts(Part.held_out)
    assert of_table.train_labels[train].bincount(minlength=4).tolist() == images.counts(Part.train)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model folder of a small transformer with a head for other classes."""
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT)
    return api.save(vit, tmp_path_factory.mktemp("vit"), list("abcde"), 32, ((0.5,) * 3, (0.5,) * 3), **VIT)


@pytest.fixture(scope="module")
def job(images, weights, tmp_path_factory):
    """The command, as a user would type it; what it printed."""
    out = tmp_path_factory.mktemp("job") / "mine"
    options = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    words = ["distill", str(images), "--out", str(out), "--teacher", str(weights), *options]
    command = [sys.executable, "-m", "vitdistill.cli", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epoch 1/1" in done.stderr and "the whole job: " in done.stderr and "epoch 1" not in done.stdout
    assert "taught minus plain" in done.stdout and "taught minus plain" not in done.stderr
    return out, words, done.stderr + done.stdout


def test_command_trains_and_compares(job):
    out, _, text = job
    assert "3 classes" in text and "fine-tuned first" in text and "taught minus plain" in text
    runs = {arm: run for run in find_runs(out / "runs") for arm in run.arms}
    assert runs.keys() == {"mine/teacher", "mine/plain", "mine/taught"}
    assert {run.status for run in runs.values()} == {"done"}
    assert runs["mine/taught"].config.teacher_weights == str(runs["mine/teacher"].model)
    counts = [len(files_of(out, part, out)) for part in ("train", "held out", "test")]
    assert {run.result["n_train"] for run in runs.values()} == {counts[0]} and sum(counts) == 30
    assert (out / "mine.html").is_file() and (out / "mine.yaml").is_file() and (out / "work").is_dir()


def test_the_page_of_a_job_shows_what_it_gets_wrong_and_needs_no_other_file(job, images):
    """The path of each mistake is the user's own file; the command on it is the one that was typed."""
    out, words, _ = job
    page = (out / "mine.html").read_text()
    inside = r"data:image/|#"
    assert not re.search(rf"(src|href)=\"(?!{inside})|<script|<link|@import", page)
    text = html.unescape(page)
    assert f"vitdistill {words[0]} {images.name} --student mobilenetv3_small_050" in text
    assert "3 classes" in text and text.index("Take ") < text.index("<h2>")
    record = read_predictions(find_run(out / "models/taught"))
    assert f"{(record.decision == record.label).mean():.1%}" in text
    seen_as = r"seen as <b><bdi>(\w+)</bdi></b>.*?is <b><bdi>(\w+)</bdi></b>.*?<bdi>(.*?)</bdi>"
    wrong = re.findall(seen_as, page, re.S)
    best = read_predictions(find_run(api.Distilled(out / "mine.yaml", out).folder()))
    assert len(wrong) == (best.decision != best.label).sum()  # of few test images all are shown
    assert re.search(r"Their paths start in \w+\.", text) and str(images.parent) not in text
    for seen, label, path in wrong:
        [file] = images.rglob(f"{label}/{Path(path).name}")
        assert file.parent.name == label != seen
    costs = pd.read_csv(out / "tables/mine_costs.csv")
    assert costs.model.tolist() == [api.Distilled(out / "mine.yaml", out).best]  # one architecture, one size
    assert f"{costs.mb[0]:.1f}" in text and f"{100 * costs.int8_low[0]:.1f} to" in text
    pairs = pd.read_csv(out / "tables/mine_classes.csv")
    assert pairs["test images"].sum() == len(files_of(out, "test", images))
    assert {"plain", "taught", "teacher"} <= {*pairs.columns}


def test_a_second_call_trains_nothing_and_more_seeds_train_only_those(job, images, weights, tmp_path):
    out = shutil.copytree(job[0], tmp_path / "job" / job[0].name, symlinks=True)
    before = {run.name: (run.folder / "metrics.csv").stat().st_mtime_ns for run in find_runs(out / "runs")}
    result = api.distill(images, teacher=str(weights), out=out, seeds=2, **SMALL)
    after = {run.name: (run.folder / "metrics.csv").stat().st_mtime_ns for run in find_runs(out / "runs")}
    assert before.items() <= after.items() and len(after) == len(before) + 2
    table = result.table().set_index("model")
    assert table.index.tolist() == ["teacher", "plain", "taught"]
    assert table.seeds.to_dict() == dict(teacher=1, plain=2, taught=2)
    both = [run.result["test_top1"] for run in find_runs(out / "runs") if "mine/plain" in run.arms]
    assert table.top1["plain"] == pytest.approx(np.mean(both))
    assert isinstance(result.student, timm.models.MobileNetV3) and result.curves() is not None


def test_a_second_job_in_a_folder_changes_nothing_of_the_first(images, weights, tmp_path):
    """Nor does a refused one leave a folder behind."""
    out = tmp_path / "out"  # the first one has not trained anything
    table = write_table(scan(preset("own", "baseline", data_root=str(images))).rows, out / IMAGES)
    before = table.read_bytes()
    shutil.copytree(images, tmp_path / "others", ignore=shutil.ignore_patterns("1.png"))
    with lock_folder(out), pytest.raises(VitdistillError, match="in use by another process"):
        api.distill(tmp_path / "others", teacher=str(weights), out=out, **SMALL)
    assert table.read_bytes() == before
    with pytest.raises(VitdistillError, match="no folder"):
        api.distill(tmp_path / "typo", teacher=str(weights), out=tmp_path / "none", **SMALL)
    assert not (tmp_path / "none").exists()


def test_it_says_that_so_few_images_show_nothing(job):
    """Few test images; the teacher, which has few of some held-out images right, is not refused."""
    out, _, text = job
    tested = len(files_of(out, "test", out))
    assert f"{tested} test images are too few" in text and "From about 30" in text
    taught = next(run for run in find_runs(out / "runs") if "mine/taught" in run.arms)
    assert not taught.config.allow_untrained and taught.config.student_head_init == "small"


def test_a_job_teaches_with_its_own_teacher_however_weak(job, monkeypatch):
    out, _, _ = job
    launched = []
    monkeypatch.setattr("vitdistill.launch.runner.run",
                        lambda config, *given, **more: launched.append(config))
    for weak in (False, True):
        monkeypatch.setattr("vitdistill.launch.queue.is_weak", lambda card: weak)
        run_cell(grid_cells(out / "mine.yaml")[-1])
    assert [config.allow_untrained for config in launched] == [False, True]


def test_what_is_done_is_shown_when_a_student_fails(job, monkeypatch, capsys):
    """The teacher and the plain student have ended; the taught one is refused."""
    out, words, _ = job
    aside = {run.folder: out / run.name for run in find_runs(out / "runs") if "mine/taught" in run.arms}
    for folder, place in aside.items():
        folder.rename(place)

    def fails(cell, *_):
        if "taught" in cell.arm:
            raise VitdistillError("no room")
    monkeypatch.setattr(api, "run_cell", fails)
    try:
        with pytest.raises(SystemExit, match="no room"):
            main(words)
    finally:
        for folder, place in aside.items():
            place.rename(folder)
    text = capsys.readouterr().out
    assert re.search(r"teacher .*vit_tiny.*\nplain .*mobilenetv3", text) and "taught minus plain" not in text
    assert f"vitdistill predict {out / 'models/plain'} IMAGES" in text


def test_models_stay_where_the_folder_of_work_is_removed(job, images, tmp_path, capsys):
    """They are folders of their own, also for a copy, as on a stick; a job that goes on takes them from
    there. A model that is in neither place is named, and what is done is shown all the same."""
    out, words, _ = job
    copy = shutil.copytree(out, tmp_path / "stick" / out.name, symlinks=True)
    before = predict(out / "models/plain", images)
    shutil.rmtree(copy / "work")
    assert not [path for path in (copy / "models").rglob("*") if path.is_symlink()]
    again = predict(copy / "models/plain", images)
    pd.testing.assert_frame_equal(before, again)
    assert find_run(copy / "models/plain").folder.parent == copy / "runs"
    words = [str(copy) if word == str(out) else word for word in words]
    assert main(words) == 0 and "use one: vitdistill predict" in capsys.readouterr().out
    run = find_run(copy / "models/plain")
    assert predict(run.model, images).probability.tolist() == before.probability.tolist()
    for folder in (run.model, copy / "models/plain"):
        shutil.rmtree(folder)
    with pytest.raises(SystemExit, match="its model is not in .* remove .* to train it again"):
        main(words)
    assert re.search(r"plain .*mobilenetv3", capsys.readouterr().out)


def test_an_adopted_teacher_keeps_its_card(job, images, tmp_path):
    """Its card says what it was trained on: not the images of the job that took it. The record names a
    command that ran."""
    source = job[0] / "models/teacher"
    result = api.distill(images, teacher=source, out=tmp_path / "other", **SMALL)
    assert (result.folder("teacher") / "card.json").read_bytes() == (source / "card.json").read_bytes()
    record, = result.models["teacher"].runs
    assert record.environment["command"].startswith("vitdistill distill ")
    trained = len(files_of(tmp_path / "other", "train", images))
    assert json.loads((record.model / "card.json").read_text())["n_train"] == trained


def test_a_field_that_loosens_a_check_is_the_same_job(job, images, weights):
    out, _, _ = job
    given = dict(data=images, teacher=str(weights), out=out, dry_run=True) | SMALL
    api.distill(**given | dict(allow_untrained=True))
    with pytest.raises(VitdistillError, match=f"epochs: 1 then, 2 now.*--teacher {out}/models/teacher keeps"):
        api.distill(**given | dict(epochs=2))


def test_an_image_size_that_a_student_can_not_take_is_named_by_a_dry_run(images, weights, tmp_path, capsys):
    """Before any speed is measured; nothing is written."""
    given = SMALL | dict(student="convnext_atto", image_size=7)
    with pytest.raises(VitdistillError, match="convnext_atto can not take images of 7 px"):
        api.distill(images, teacher=str(weights), out=tmp_path / "out", dry_run=True, **given)
    assert "measuring" not in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.fixture
def own_job(job, images, tmp_path):
    """A copy of the job and of its images, which a test may change: (images, folder of the job)."""
    root, out = tmp_path / "images", tmp_path / "job" / job[0].name
    shutil.copytree(images, root)
    shutil.copytree(job[0], out, symlinks=True)
    return root, out


def test_a_job_whose_images_were_replaced_says_so(own_job, weights, capsys):
    """Two photographs change places; a dry run says it too, and nothing is trained or written."""
    root, out = own_job
    again = functools.partial(api.distill, root, out=out, teacher=weights, **SMALL)
    again(dry_run=True)
    assert "all is done" in capsys.readouterr().out
    first, second = (root / name / "0.png" for name in ("dark", "light"))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    for dry_run in (True, False):
        with pytest.raises(VitdistillError, match=r"other images .* \(2 changed, such as .*0.png\): name"):
            again(dry_run=dry_run)
        assert "all is done" not in capsys.readouterr().out
    after = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    changed = {file for file in before if before[file] != after.get(file)}
    assert changed <= {out / "lock", out / "work/digests.json"}


def test_evaluate_says_which_images_the_model_was_trained_on(job, images, capsys):
    """Some were held out and some are for the test; its accuracy of these is said too."""
    out = job[0]
    trained = len(files_of(out, "train", images))
    assert main(["evaluate", str(out / "models/plain"), str(images)]) == 0
    text = capsys.readouterr().out
    assert f"{trained} of these 30 images are training images" in text
    assert f"Of the other {30 - trained} images" in text
    main(["evaluate", str(out / "models/plain"), str(images), "--labels", str(out / IMAGES), "--json"])
    assert json.loads(capsys.readouterr().out)["training_images"] == 0


def test_a_job_says_which_test_images_its_weights_have_seen(own_job, tmp_path, capsys):
    """It goes on with another job's teacher and student, and its table takes the images that these were
    trained on for the test. Images that are only added do not change sides: nothing of the test was seen."""
    root, out = own_job
    for kind, name in enumerate(("dark", "grey", "light")):
        for i in range(10, 15):
            Image.new("RGB", (9, 9), (i, kind, 9)).save(root / name / f"{i}.png")
    given = dict(data=root, teacher=out / "models/teacher", dry_run=True, out=tmp_path / "next") | SMALL
    given |= dict(student_weights=str(out / "models/taught"))
    api.distill(**given)
    assert not re.search(r" has seen .* test images", capsys.readouterr().out)
    other = dict(train="test", test="train")
    rows = [row._replace(part=other.get(row.part, row.part)) for row in table_rows(out / IMAGES)]
    api.distill(**given, labels=write_table(rows, tmp_path / "labels.csv"))
    text = capsys.readouterr().out
    seen = len(files_of(out, "train", root))
    for name in ("models/teacher", "models/taught"):
        assert re.search(rf"{out / name} has seen {seen} of {seen} test images, such as \w+/\d", text)


def test_images_that_are_added_are_said_and_not_mixed_into_a_job(own_job, weights, capsys):
    """A dry run says it too. The table may be edited and given to a new job; in its own job it is refused."""
    root, out = own_job
    again = functools.partial(api.distill, root, teacher=weights, **SMALL)
    Image.effect_noise((40, 40), 90).save(root / "dark/new.png")
    for dry_run in (True, False):
        with pytest.raises(VitdistillError, match="1 new images?.*such as dark/new.png.*--teacher .* keeps"):
            again(out=out, dry_run=dry_run)
    (root / "dark/new.png").unlink()
    rows = table_rows(out / IMAGES)
    edited = next(row for row in rows if row.part == "train")
    rows[rows.index(edited)] = edited._replace(part="held out")
    write_table(rows, out / IMAGES)
    with pytest.raises(VitdistillError, match=f"1 of another class or part, such as {edited.file}.*labels"):
        again(out=out)
    capsys.readouterr()
    again(out=out.parent / "next", labels=out / IMAGES, dry_run=True)
    said = capsys.readouterr().out
    before = len(files_of(out, "train", root))
    assert f"{before} training images" in said and "as images.csv says" in said


def test_it_is_a_study(job, capsys):
    out, _, _ = job
    assert main(["grid", str(out / "mine.yaml"), "--status"]) == 0
    assert ", 0 left" in capsys.readouterr().out
    assert main(["compare", str(out / "mine.yaml"), "--out", str(out / "again")]) == 0


def state_of_the_notebook():
    """What a user's own cells depend on, and a call of ours might change."""
    loggers = {name: logging.getLogger(name).level for name in ("", "torch", "matplotlib", "PIL", "timm")}
    options = ("display.max_rows", "display.max_columns", "display.max_colwidth", "display.precision")
    environment = {name: text for name, text in os.environ.items() if not name.startswith("KMP_")}  # OpenMP's
    return dict(
        matplotlib=dict(plt.rcParams), colors=[colors.to_hex(letter) for letter in "bgrmyck"],
        random=[random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()],
        torch=[torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
               torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()],
        pandas={name: pd.get_option(name) for name in options}, numpy=np.geterr(), logging=loggers,
        signals=[signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        process=[os.getcwd(), environment, sys.path[:], sys.stdout, sys.stderr, warnings.filters[:]])


def test_a_call_leaves_the_notebook_as_it_was(job, images, weights, tmp_path, monkeypatch):
    """Also what the notebook has set itself: a call sets nothing back to a default."""
    out, _, _ = job
    monkeypatch.setitem(plt.rcParams, "lines.linewidth", 7)
    result = api.Distilled(out / "mine.yaml", out)
    files = [str(images / f"dark/{i}.png") for i in range(3)]
    pixels = torch.zeros(2, 3, 32, 32)
    student = timm.create_model("resnet10t", num_classes=3)
    config = Config(dataset="digits", data_fraction=0.02, student="resnet10t", epochs=1, batch_size=8,
                    threads=1, runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"))
    constants = ((0.5,) * 3,) * 2

    def own_loop():
        loss = api.loss("soft", alpha=0.5)
        teacher_answers = api.memo(api.load_teacher(result.folder()), tmp_path / "memo", loss, 2)
        loss(student(pixels), teacher_answers(pixels, [0, 1]), torch.tensor([0, 1])).backward()

    def job_again(**more):
        return lambda: api.distill(images, out=out, teacher=weights, **SMALL, **more)

    calls = dict(
        again=job_again(), dry=job_again(dry_run=True), table=result.table, curves=result.curves,
        pictures=result.pictures, show=result.show, words=lambda: str(result), own_loop=own_loop,
        predict=lambda: result.predict(files), student=lambda: result.student,
        evaluate=lambda: evaluate(result.folder(), images),
        save=lambda: api.save(student, tmp_path / "saved", list("abc"), 32, constants),
        compare=lambda: write_pictures(load_comparison(out / "mine.yaml"), tmp_path),
        train=lambda: train(config))
    for name, call in calls.items():
        before = state_of_the_notebook()
        call()
        after = state_of_the_notebook()
        changed = [part for part in before if before[part] != after[part]]
        assert not changed, (name, changed)


def test_a_finished_job_is_shown_where_nothing_can_be_written(job, tmp_path, capsys):
    """Such as /kaggle/input: a disk that is mounted for reading."""
    here = shutil.copytree(job[0], tmp_path / "mine", symlinks=True)
    mount = subprocess.run(["mount", "--bind", here, here], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting needs root on Linux")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", here], check=True)
        result = api.Distilled(here / "mine.yaml", here)
        assert len(result.table()) == 3 and result.folder().is_dir()
        assert result.show().file == here / "mine.html" and "iframe" in result.show()._repr_html_()
        with pytest.raises(SystemExit) as refusal:
            main(["export", str(result.folder())])
        sentence = str(refusal.value)
        assert "model.onnx can not be written" in sentence and "--out" in sentence and ".tmp" not in sentence
    finally:
        subprocess.run(["umount", "-l", here])


def test_predictions_are_those_of_the_run(job, images, capsys):
    """The same classes as in the record; on the command line as CSV and as JSON."""
    out, _, _ = job
    run = next(run for run in find_runs(out / "runs") if "mine/taught" in run.arms)
    record = read_predictions(run)
    files = files_of(out, "test", images)
    table = predict(run.model, files)
    names = load_model(run.model).classes
    assert table["class"].tolist() == [names[number] for number in record.sort_values("image").decision]
    assert main(["predict", run.name, *files, "--runs", str(out / "runs")]) == 0
    printed = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert printed["class"].tolist() == table["class"].tolist()
    assert np.allclose(printed.probability, table.probability)
    assert main(["predict", str(run.model), *files, "--json", "--top", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["class"] for row in rows] == table["class"].tolist() and len(rows[0]["top"]) == 2


@pytest.mark.parametrize("mark", [",", ";", "tab"])
def test_a_table_of_predictions_is_read_back_as_labels(job, images, tmp_path, capsys, mark):
    """With the mark that Excel needs, and names of files as they were typed."""
    folder = shutil.copytree(images, tmp_path / "photos, new")
    (folder / "dark/0.png").rename(folder / "dark/K\u00e4se, alt.png")
    (folder / "dark/notes.txt").touch()
    model, table = job[0] / "models/plain", tmp_path / "seen.csv"
    typed = os.path.relpath(folder)
    assert main(["predict", str(model), typed, "--out", str(table), "--sep", mark]) == 0
    said = capsys.readouterr()
    assert said.out == "" and "dark/notes.txt (empty)" in said.err
    assert table.read_bytes().startswith(b"\xef\xbb\xbfpath")  # as Excel knows UTF-8
    seen = predict(model, folder)
    result = evaluate(model, folder, labels=table)
    assert len(result.right) == 30 and result.right.all()  # of the model itself
    assert main(["evaluate", str(model), str(folder), "--labels", str(table)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("accuracy 100.0%") and "how often the two agree" in said.err
    labels = {str(folder / name): image.row.kind for name, image in read_labels(table, folder).items()}
    assert labels == dict(zip(seen.path, seen["class"]))


def test_the_export_predicts_the_same(job, images, tmp_path, capsys):
    """By vitdistill, and by the lines of docs/library.md, which do without it."""
    from vitdistill.deploy.export import export_onnx
    out, _, _ = job
    run = next(run for run in find_runs(out / "runs") if "mine/teacher" in run.arms)
    file = export_onnx(run)
    one, other = (predict(model, files_of(out, "test", images)) for model in (run.model, file))
    assert one["class"].tolist() == other["class"].tolist()
    assert np.allclose(one.probability, other.probability, atol=1e-3)
    image = Path(one.path[0])
    lines = snippet("onnxruntime").replace("'model.onnx'", repr(str(file)))
    exec(lines.replace("'image.png'", repr(str(image))), seen := {})
    assert capsys.readouterr().out.split()[0] == one["class"][0]
    assert seen["probabilities"].max() == pytest.approx(one.probability[0], abs=0.01)
    assert len(seen["probabilities"]) == 3 and seen["probabilities"].sum() == pytest.approx(1, abs=1e-5)
    rng = np.random.default_rng(0)  # photographs of 4:3, upright and not, whose middle is between pixels
    for number, (width, height) in enumerate([(400, 300), (301, 401), (1023, 767), (640, 481), (45, 33)]):
        photo = tmp_path / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(photo)
        exec(lines.replace("'image.png'", repr(str(photo))), seen := {})
        assert np.array_equal(seen["square"], load_model(file).read(photo))


def test_smaller_files_of_a_job_are_measured_on_its_images(job, images, tmp_path, capsys):
    """By the command; the whole model has the accuracy of its run, `evaluate` that of the table."""
    from vitdistill.deploy.evaluate import evaluate
    from vitdistill.deploy.measure import measure
    out, _, _ = job
    run = next(run for run in find_runs(out / "runs") if "mine/taught" in run.arms)
    file = tmp_path / "student.onnx"
    assert main(["export", str(out / "models/taught"), "--int8", "--fp16", "--out", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "int8 minus fp32: " in shown and f"over {len(files_of(out, 'test', images))} test images" in shown
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"student.onnx", "student.int8.onnx", "student.fp16.onnx"}
    rows = measure(out / "models/taught", ["int8"])
    assert rows[0].accuracy == pytest.approx(run.result["test_top1"]) and not list(run.model.glob("*.onnx"))
    for row, name in zip(rows, ("student.onnx", "student.int8.onnx")):
        found = evaluate(tmp_path / name, images, labels=out / IMAGES)
        assert found.accuracy == row.accuracy and found.balanced == row.balanced
        seen = predict(tmp_path / name, files_of(out, "test", images))
        assert (seen["class"] == [Path(path).parent.name for path in seen.path]).mean() == row.accuracy


def test_a_copied_job_uses_its_own_files(job, images, weights, tmp_path, capsys, monkeypatch):
    """Its study, its models and its records are those of the copy, also when the first job has changed or is
    gone."""
    out, _, _ = job
    copy = shutil.copytree(out, tmp_path / "copy" / out.name, symlinks=True)
    gone = next(run for run in find_runs(copy / "runs") if "mine/plain" in run.arms)
    (gone.folder / "result.json").unlink()
    assert main(["grid", str(copy / "mine.yaml"), "--status"]) == 0
    assert str(out) not in (shown := capsys.readouterr().out) and ", 1 left" in shown
    shutil.copy(out / "runs" / gone.name / "result.json", gone.folder)
    assert main(["compare", str(copy / "mine.yaml"), "--out", str(tmp_path / "page")]) == 0
    result = api.Distilled(copy / "mine.yaml", copy)
    assert {run.folder.parent for runs in result.runs().values() for run in runs.values()} == {copy / "runs"}
    folders = {run.model.parents[1] for runs in result.runs().values() for run in runs.values()}
    assert folders == {copy / "work"}
    for name in ("taught", "plain"):
        assert (copy / "models" / name).resolve().is_relative_to(copy)
    assert [*result.test_images] == files_of(out, "test", images)
    monkeypatch.setattr(api, "train_all", lambda cells, *_: cells)  # the job goes on where it lies now
    assert api.distill(images, teacher=str(weights), out=copy, **SMALL)
    assert find_run(copy / "models/taught").folder.parent == copy / "runs"


def test_pictures_leave_out_images_that_the_job_left_out(own_job):
    root, out = own_job
    asked = api.Distilled(out / "mine.yaml", out)
    runs = [model.runs[0] for model in asked.models.values()]
    for run in runs:
        run.config = replace(run.config, data_root=str(root))
    broken, *others = files_of(out, "test", root)
    Path(broken).write_bytes(b"no image")
    with pytest.raises(VitdistillError, match="can not be read"):
        asked.pictures(30)
    for run in runs:
        run.config = replace(run.config, skip_broken=True)
    assert sum(bool(ax.images) for ax in asked.pictures(30).axes) == len(others)
    with pytest.raises(VitdistillError, match="most = 0"):
        asked.pictures(0)


def test_an_unreadable_image_is_named_and_the_others_are_predicted(job, tmp_path, capsys):
    out, _, _ = job
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (9, 9)).save(tmp_path / "fine.png")
    run = next(run for run in find_runs(out / "runs") if "mine/plain" in run.arms)
    assert main(["predict", str(run.model), str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "broken.png can not be read" in printed.err and len(pd.read_csv(io.StringIO(printed.out))) == 1


def test_a_missing_image_is_named_and_the_others_are_predicted(job, images, tmp_path, capsys):
    out, _, _ = job
    image = images / "dark/0.png"
    model = str(out / "models/plain")
    assert main(["predict", model, "gone.png", str(image), "away.png"]) == 1
    printed = capsys.readouterr()
    assert "gone.png" in printed.err and "away.png" in printed.err
    assert pd.read_csv(io.StringIO(printed.out)).path.tolist() == [str(image)]
    with pytest.raises(VitdistillError, match="gone.png, away.png"):
        predict(model, ["gone.png", image, "away.png"])


def test_images_behind_links_are_those_that_training_reads(job, images, tmp_path):
    """Folders of classes are links, one of them leads back; the order is that of training too."""
    out, _, _ = job
    (tmp_path / "train/grey").mkdir(parents=True)
    for file in (images / "grey").iterdir():
        shutil.copy(file, tmp_path / "train/grey")
    (tmp_path / "train/dark").symlink_to(images / "dark")
    (tmp_path / "train/grey/again").symlink_to(tmp_path / "train")
    listed = [name for name, *_ in in_folders(tmp_path, "train").files]
    table = predict(out / "models/plain", tmp_path / "train")
    assert table.path.tolist() == [f"{tmp_path}/{name}" for name in listed] and len(listed) == 20


def test_a_model_with_broken_weights_is_refused(job, images, tmp_path, capsys):
    """One number that is no number, in the weights; or answers that are none, in an ONNX file."""
    out, _, _ = job
    ignore = shutil.ignore_patterns("*.onnx")  # of a job that has measured it
    model = shutil.copytree(out / "models/plain", tmp_path / "model", ignore=ignore)
    state = load_file(model / "model.safetensors")
    state[next(name for name in state if name.endswith("classifier.bias"))][0] = float("inf")
    save_file(state, model / "model.safetensors")
    for words in (["predict", str(model), str(images), "--json"], ["export", str(model)]):
        with pytest.raises(SystemExit, match="not finite"):
            main(words)
    assert not capsys.readouterr().out and not (model / "model.onnx").exists()


def test_a_model_of_the_hub_is_used_by_its_name(job, images, tmp_path, monkeypatch, capsys):
    """Its files are in out/hub, as `fetch` leaves them."""
    out, _, _ = job
    (tmp_path / ".vitdistill").touch()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(out / "models/taught", tmp_path / "out/hub/me--small")
    assert main(["predict", "hf-hub:me/small", str(images / "dark/0.png")]) == 0
    here = predict(out / "models/taught", images / "dark/0.png")
    assert pd.read_csv(io.StringIO(capsys.readouterr().out))["class"].tolist() == here["class"].tolist()


def test_the_card_says_what_the_model_knows(job):
    out, _, text = job
    card = (out / "models/taught/README.md").read_text()
    run = find_run(out / "models/taught")
    trained, tested = (len(files_of(out, part, out)) for part in ("train", "test"))
    accuracy = f"{run.result['test_top1']:.1%} of {tested} images"
    facts = "3: dark, grey, light", f"{trained} images", accuracy, "vit_tiny_patch16", "vitdistill predict "
    for words in facts:
        assert words in card
    assert f"use one: vitdistill predict {out / 'models/plain'} IMAGES" in text  # six images decide nothing


def test_a_closed_output_is_one_sentence(job, images):
    out, _, _ = job
    command = [PYTHON, "-m", "vitdistill.cli", "predict", str(out / "models/plain"), str(images)]
    closed = ["bash", "-c", shlex.join(command) + " >&-"]
    done = subprocess.run(closed, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "standard output is closed" in done.stderr and "Traceback" not in done.stderr


def test_a_reader_that_stops_is_no_error(job, images):
    out, _, _ = job
    run = next(run for run in find_runs(out / "runs") if "mine/plain" in run.arms)
    predict = f"PYTHONUNBUFFERED= {PYTHON} -m vitdistill.cli predict {run.model} {images}"
    head = ["bash", "-o", "pipefail", "-c", f"{predict} | head -n 0"]
    done = subprocess.run(head, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 141 and "BrokenPipe" not in done.stderr, done.stderr


def test_broken_images_are_named_at_once_and_can_be_removed(images, weights, tmp_path):
    shutil.copytree(images, mine := tmp_path / "mine")
    for name in ("a", "b"):
        (mine / f"dark/{name}.png").write_text("no image")
    with pytest.raises(VitdistillError, match=f"{mine}/dark/a.png .*{mine}/dark/b.png .*: replace or"):
        api.distill(mine, teacher=str(weights), out=tmp_path / "out", dry_run=True, **SMALL)
    for name in ("a", "b"):
        (mine / f"dark/{name}.png").unlink()
    api.distill(mine, teacher=str(weights), out=tmp_path / "out", dry_run=True, **SMALL)


def test_broken_images_of_both_parts_are_named_together(images, weights, tmp_path):
    for part in ("train", "val"):
        shutil.copytree(images, mine := tmp_path / "mine" / part)
        (mine / "dark/a.png").write_text("no image")
    with pytest.raises(VitdistillError, match="train/dark/a.png .*val/dark/a.png "):
        api.distill(tmp_path / "mine", teacher=str(weights), out=tmp_path / "out", dry_run=True, **SMALL)


def test_broken_images_are_found_before_a_job_starts_and_left_out_where_asked(
        images, weights, tmp_path, capsys):
    """A cut image keeps its size, so that only its pixels tell; its class may have fewer images than
    others."""
    folder = shutil.copytree(images, tmp_path / "images")
    for name in ("dark/3.png", "light/7.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-900])
    for i in range(8):
        (folder / f"grey/{i}.png").unlink()
    for i in range(20):
        shutil.copy(folder / "light/1.png", folder / f"light/more{i}.png")
        shutil.copy(folder / "grey/9.png", folder / f"grey/more{i}.png")
    with pytest.raises(VitdistillError, match=r"2 images .*dark/3.png .*light/7.png .*skip_broken"):
        api.distill(folder, teacher=str(weights), out=tmp_path / "job", dry_run=True, **SMALL)
    options = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    asked = ["distill", str(folder), "--out", str(tmp_path / "job"), "--teacher", str(weights), *options,
             "--dry-run"]
    assert main([*asked, "--skip_broken", "True"]) == 0
    told = capsys.readouterr().out
    assert "2 left out, since skip_broken is set" in told and "dark/3.png" in told
    assert re.search(r"light has \d\d training images, \w+ has \d", told)


def test_weights_of_another_architecture_are_refused_before_anything_trains(images, weights, tmp_path):
    shutil.copy(weights / "model.safetensors", file := tmp_path / "bare.safetensors")
    with pytest.raises(VitdistillError, match="does not fit resnet18"):
        api.distill(images, teacher=str(file), teacher_name="resnet18", out=tmp_path / "out", dry_run=True,
                    **SMALL)


def test_weights_with_the_right_head_are_adopted(images, tmp_path):
    """A bare file, whose name begins with its architecture."""
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32)
    save_file(vit.state_dict(), file := tmp_path / "vit_tiny_patch16_224.mine.safetensors")
    with mock.patch("vitdistill.launch.runner.run", side_effect=VitdistillError("a student")), \
            pytest.raises(VitdistillError, match="a student"):
        api.distill(images, teacher=str(file), out=tmp_path / "out", allow_untrained=True, **SMALL)
    adopted, = (tmp_path / "out/work").rglob("model.safetensors")
    assert torch.equal(load_model(adopted.parent).forward.model.head.weight, vit.head.weight)


def test_a_teacher_that_was_saved_by_hand_is_fine_tuned(tmp_path):
    """Its head has as many classes, but others, and its pixels may be scaled otherwise."""
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, **VIT)
    folder = api.save(vit, tmp_path / "vit", list("abc"), 32, ((0.0,) * 3, (1.0,) * 3), **VIT)
    for classes in ("abc", "xyz"):
        assert teacher_part(str(folder), "", 32, list(classes))["part"] == "teacher"


@pytest.mark.parametrize("given, message", [
    (dict(teacher="vit_tiny_patch16"), "teacher = 'vit_tiny_patch16' is no file and no model of timm"),
    (dict(student="resnet1"), "resnet1"),
    (dict(lrr=1), "unknown field 'lrr'"),
    (dict(distillation="hrad"), "did you mean 'hard'"),
    (dict(optimizer="sdg"), "did you mean 'sgd'"),
    (dict(image_size="big"), "image_size = 'big' has the wrong form"),
    (dict(data="nowhere"), "no folder"),
])
def test_bad_input_is_one_sentence_before_anything_is_trained(given, message, images, weights, tmp_path):
    with pytest.raises(VitdistillError, match=message):
        api.distill(**dict(data=images, teacher=str(weights), out=tmp_path) | SMALL | given)
    assert not (tmp_path / "runs").exists() and not list(tmp_path.glob("*.yaml"))  # another try is free


def test_all_that_is_wrong_is_named_at_once_in_the_users_words(
        images, weights, tmp_path, capsys, monkeypatch):
    """A dry run writes into a temporary folder, which nobody knows."""
    (tmp_path / "drafts").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "drafts"))
    mine, out = shutil.copytree(images, tmp_path / "mine"), tmp_path / "out"
    for name in ("dark", "grey"):
        (mine / name / "notes.txt").touch()
    given = dict(data=mine, teacher=str(weights), out=out, dry_run=True)
    Image.open(mine / "dark/1.png").save(mine / "dark/1.HEIC", "JPEG")  # a phone renames
    api.distill(**given, **SMALL)
    said = capsys.readouterr().out
    assert f"{mine}: 3 classes" in said
    assert f"{mine}: left out of the dataset: dark/notes.txt, grey/notes.txt (empty)." in said
    counts = re.search(r"(\d+) training images, (\d+) test images .*?(\d+) more of train", said)
    assert sum(map(int, counts.groups())) == 31

    (mine / "dark/0.png").write_bytes(b"no image")
    (mine / "few").mkdir()
    shutil.copy(mine / "dark/1.png", mine / "few/1.png")
    wrong = dict(teacher="vit_tiny_patch16", unlabelled="nowhere", lr=-1, optimiser="adam", seeds=0)
    with pytest.raises(VitdistillError, match="^7 things to mend") as error:
        api.distill(**given | SMALL | wrong)
    for words in ("dark/0.png", "few: too few", "vit_tiny_patch16", "nowhere", "lr = -1", "optimiser",
                  "seeds = 0"):
        assert words in str(error.value)
    said += capsys.readouterr().out + str(error.value)
    assert "drafts" not in said and str(out) not in said and not out.exists()


def test_a_recipe_for_other_data_reads_the_folder(images, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "train_all", lambda cells, *_: cells)
    cells = api.distill(images, teacher=str(weights), out=tmp_path / "out", preset="demo", **SMALL)
    assert {cell.config.dataset for cell in cells} == {"imagefolder"}


def test_another_student_is_a_further_row(job, images, weights, tmp_path):
    """One teacher and one memo serve both; the first student is not trained again. Each has its own start."""
    out, words, _ = job
    before = {run.name for run in find_runs(out / "runs")}
    runs = api.Distilled(out / "mine.yaml", out).runs()
    seeds = len(runs["plain"])
    start = tmp_path / "start.safetensors"
    save_file(timm.create_model("resnet10t", num_classes=3).state_dict(), start)
    small = SMALL | dict(student="resnet10t", student_weights=f"resnet10t={start}")
    result = api.distill(images, teacher=str(weights), out=out, seeds=seeds, **small)
    starts = {name: model.config.student_weights for name, model in result.models.items()}
    del starts["teacher"]
    assert starts == dict.fromkeys(["plain", "taught"], "") | dict.fromkeys(
        ["plain-resnet10t", "taught-resnet10t"], str(start))
    table = result.table().set_index("model")
    assert table.index.tolist() == ["teacher", "plain", "taught", "plain-resnet10t", "taught-resnet10t"]
    assert {run.name for run in find_runs(out / "runs")} > before
    assert table.architecture["taught-resnet10t"] == "resnet10t" and table.seeds["plain-resnet10t"] == seeds
    one, other = (table.top1[f"{kind}-resnet10t"] for kind in ("taught", "plain"))
    assert table.difference["taught-resnet10t"] == pytest.approx(one - other)
    assert pd.isna(table.difference["plain"])
    assert load_model(result.folder("taught-resnet10t")).forward.model.num_classes == 3
    best = result.best  # of so few held-out images none decides: a student on labels alone, the smaller one
    assert best in ("plain", "plain-resnet10t") and result.folder() == out / "models" / best
    assert re.search(rf"Take {best}.\n\d held-out images show no clear difference from", str(result))
    file = next((images / "dark").glob("*.png"))
    for name in ("", "plain-resnet10t"):
        wanted = predict(out / "models" / (name or best), file)
        pd.testing.assert_frame_equal(result.predict(file, name=name), wanted)
    with pytest.raises(VitdistillError, match="no plain-resnet has ended: did you mean 'plain-resnet10t'"):
        result.pictures(name="plain-resnet")
    taught = {arm: run for run in find_runs(out / "runs") for arm in run.arms if "taught" in arm}
    assert len({run.config.teacher_weights for run in taught.values()}) == 1
    with pytest.raises(VitdistillError, match="student_kwargs = .* one student, and this job .*resnet10t"):
        api.distill(images, teacher=str(weights), out=out, student_kwargs=dict(drop_rate=0.1), **SMALL)


def test_notebook(job, images, weights, tmp_path):
    """It goes on with the job of the command: nothing is left to train."""
    out, _, _ = job
    notebook = execute("e08_own_images", tmp_path / "e08.ipynb", data=str(images), teacher=str(weights),
                       out=str(out), **SMALL)
    assert "use one: vitdistill predict" in said(notebook)
    pictures = [output for cell in notebook["cells"] for output in cell.get("outputs", []) if "image/png" in
                output.get("data", {})]
    assert len(pictures) == 2  # the curves, and some test images
    [cell] = [cell for cell in notebook["cells"] if "".join(cell["source"]) == "result"]
    table = "".join(cell["outputs"][0]["data"]["text/html"])
    result = api.Distilled(out / "mine.yaml", out)
    assert f"{result.table().top1.iloc[0]:.1%} (" in table and "NaN" not in table
    # JupyterLab leaves the frame out of a notebook that papermill has executed: the line names the page
    shown = result.show()._repr_html_()
    assert shown.startswith(f"<p>page: {out}/mine.html") and "<iframe srcdoc=" in shown


@pytest.mark.parametrize("kind", ["hard", "soft", "hard+soft", "dist", "standardized"])
def test_a_loop_of_ones_own_has_the_losses_of_the_package(kind, tiny, tmp_path):
    """A teacher, a loss and a memo in a plain loop against `batches` and the package's criterion, batch by
    batch."""
    config = resolve(preset("demo", "distilled", student="resnet18", data_fraction=0.1, allow_untrained=True,
                            distillation=kind, teacher_kwargs=VIT, precision="fp32",
                            teacher_precision="fp32"))
    with contextlib.redirect_stdout(io.StringIO()):
        setup = prepare(config, Ranks())
    theirs = setup.answers.teacher
    folder = api.save(theirs.model, tmp_path / "vit", setup.data.classes, 32, theirs.constants, **VIT)
    teacher = api.load_teacher(folder, mean_std=setup.data.mean_std)
    loss = api.loss(kind, temperature=config.temperature)
    answers = api.memo(teacher, tmp_path / "memo", loss, keys=10**4)
    for number, batch in enumerate(batches(setup, epoch=0)):
        with torch.no_grad():
            heads = setup.student(batch.pixels)
            expected, _ = setup.criterion(heads, batch)
            keys = number * config.batch_size + torch.arange(len(batch.targets))
            got = loss(heads, answers(batch.pixels, keys), batch.targets)
        assert got.item() == pytest.approx(expected.item(), rel=1e-3)
