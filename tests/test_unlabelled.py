"""Images that nobody labelled: the same result on any number of ranks and after a kill, and answers that are
shared."""
import shutil
import subprocess
import time
from dataclasses import replace

import numpy as np
import pytest
import timm
from PIL import Image

from conftest import PYTHON, assert_same, elsewhere, environment, run_of
from conftest import train_command
from conftest import wait_until
from vitdistill import api
from vitdistill.base import VitdistillError
from vitdistill.config import Config, save
from vitdistill.data import load_data
from vitdistill.data.labels import IMAGES, Part, table_rows
from vitdistill.job.folder import unlabelled_folder
from vitdistill.job.plan import Source, images_of
from vitdistill.train.loop import train


@pytest.fixture
def more(tmp_path):
    """A folder of images at two depths, written as pictures: digits, and five that are noise."""
    digits = load_data(Config(dataset="digits"))
    draw = np.random.default_rng(0)
    for row in range(40):
        noise = draw.integers(0, 256, (32, 32, 3), np.uint8)
        file = tmp_path / "more" / ("a" if row % 2 else "b/c") / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise if row < 35 else digits.train_images[row].numpy()).save(file)
    return str(tmp_path / "more")


def test_killed_run_ends_as_one_left_alone(recipe, tmp_path, more):
    """SIGKILL in mid-training, all of a recipe on, a folder without labels: the same record and weights."""
    config = replace(recipe, epochs=8, batch_size=16, unlabelled=more)
    one = train(elsewhere(config, tmp_path / "alone"))
    cut = elsewhere(config, tmp_path / "cut")
    file = save(cut, tmp_path / "cut.yaml")
    command = train_command(file, python=PYTHON)
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.STDOUT)
    try:
        assert wait_until(lambda: run_of(cut).folder.exists() and run_of(cut).epochs_done >= 3, 90)
        time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    assert run_of(cut).epochs_done < 8
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=120)
    assert_same(one, run_of(cut))


def test_answers_are_shared(tiny, tmp_path, more, capsys):
    """The memo of a taught student serves one with unlabelled images; these have another, which serves the
    next."""
    tiny = replace(tiny, epochs=4)
    train(tiny)
    taught = train(replace(tiny, unlabelled=more))
    assert "35 unlabelled images" in (said := capsys.readouterr().out) and "5 also in train" in said
    asked = (1 - taught.metrics().memo_hit_rate) * 257
    assert 0 < asked.sum() <= 35 * 18 and taught.result["n_unlabelled"] == 35
    assert (asked <= 129).all()  # half of each batch has answers already
    again = train(replace(tiny, unlabelled=more, distillation="hard", lr=2e-3))
    assert (again.metrics().memo_hit_rate == 1).all()


def test_another_folder_is_another_run(tiny, tmp_path, more):
    """A file more or less makes another run; a moved folder does not."""
    one = run_of(replace(tiny, unlabelled=more)).name
    shutil.copytree(more, tmp_path / "moved")
    assert run_of(replace(tiny, unlabelled=str(tmp_path / "moved"))).name == one != run_of(tiny).name
    next((tmp_path / "moved").rglob("*.png")).unlink()
    assert run_of(replace(tiny, unlabelled=str(tmp_path / "moved"))).name != one


def test_a_folder_becomes_a_third_student(tmp_path, more, known_speed, capsys):
    """DIR/unlabelled beside folders of classes: three arms on one memo; those that have begun go on without
    it."""
    draw, mine = np.random.default_rng(1), tmp_path / "mine"
    for name, low in (("dark", 0), ("light", 160)):
        for n in range(15):
            (mine / name).mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(low, low + 90, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(mine / name / f"{n}.png")
    shape = dict(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5, **shape)
    teacher = api.save(vit, tmp_path / "vit", list("abcde"), 32, ((0.5,) * 3, (0.5,) * 3), **shape)
    given = dict(student="mobilenetv3_small_050", teacher=str(teacher), out=tmp_path / "job", epochs=1,
                 image_size=32, teacher_size=32, nproc=1, student_pretrained=False)
    assert api.distill(mine, **given).table().model.tolist() == ["teacher", "plain", "taught"]
    shutil.copytree(more, mine / "unlabelled")
    shutil.copy(mine / "dark" / "3.png", mine / "unlabelled" / "copy.png")
    capsys.readouterr()
    result = api.distill(mine, **given)
    assert result.table().model.tolist() == ["teacher", "plain", "taught", "unlabelled"]
    said = capsys.readouterr().out
    assert "41 images without labels" in said and "40 unlabelled images of" in said
    assert "unlabelled minus taught" in said
    rows = table_rows(result.out / IMAGES)
    assert said.count("is done already") == 3 and sum(row.part == Part.unlabelled for row in rows) == 40
    (mine / "unlabelled" / "broken.png").write_bytes(b"no image")
    with pytest.raises(VitdistillError, match="broken.png"):
        api.distill(mine, **given)


def test_copies_of_the_training_images_are_named_before_anything_trains(tmp_path):
    """People keep all their images in one folder, and sort a part of them into classes."""
    draw = np.random.default_rng(2)
    for part, name in [(part, name) for part in ("train", "val") for name in ("cat", "dog")]:
        (tmp_path / "mine" / part / name).mkdir(parents=True)
        for n in range(15):
            pixels = draw.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "mine" / part / name / f"{n}.png")
    shutil.copytree(tmp_path / "mine/train", tmp_path / "mine/unlabeled_2020")
    folder = unlabelled_folder(tmp_path / "mine", None)
    assert folder.name == "unlabeled_2020"
    with pytest.raises(VitdistillError, match="leaves no image to learn from .30 also in train of 30"):
        images_of(Source(tmp_path / "mine", tmp_path / "job", unlabelled=folder), dict(preset="own"))
