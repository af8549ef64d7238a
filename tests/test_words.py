"""A teacher that knows the classes by their names alone: a student learns them from its answers."""
import json
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vitdistill import api
from vitdistill.base import VitdistillError
from vitdistill.deploy.evaluate import evaluate
from vitdistill.deploy.measure import measure
from vitdistill.deploy.predict import predict
from vitdistill.study.agreement import agreements
from vitdistill.study.results import read_predictions
from vitdistill.teachers.card import Card

pytest.importorskip("transformers", reason="the extra captions is not installed")
open_clip = pytest.importorskip("open_clip", reason="the extra captions is not installed")
from vitdistill.teachers.encoders import DualEncoder, TextTower, build_tokenizer, fit_text_tower  # noqa: E402
from vitdistill.teachers.encoders import image_tower, save_dual, tower_settings  # noqa: E402

VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
WORDS = dict(c1="dark", c2="grey", c3="light")
TINY = dict(embed_dim=16, vision_cfg=dict(image_size=32, layers=1, width=32, head_width=16, patch_size=16),
            text_cfg=dict(context_length=32, vocab_size=49408, width=32, heads=2, layers=1))
JOB = dict(student="vit_tiny_patch16_224", student_kwargs=VIT, student_pretrained=False, epochs=12,
           image_size=32, nproc=1, lr=3e-3)
pytestmark = pytest.mark.usefixtures("known_speed")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of noisy pictures, dark to bright, in folders whose names say nothing."""
    folder = tmp_path_factory.mktemp("images")
    for c, name in enumerate(WORDS):
        (folder / name).mkdir()
        for i in range(40):
            pixels = np.random.default_rng([c, i]).integers(80 * c, 80 * c + 80, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A dual encoder of our own: a text tower that was fitted to other pictures, with their texts."""
    facts = dict(student="vit_tiny_patch16_224", stem="imagenet", student_kwargs=VIT, side=32, size=32,
                 constants=((0.5,) * 3,) * 2)
    torch.manual_seed(0)
    image = image_tower(facts)
    texts = [*WORDS.values()] * 20
    pixels = []
    for i in range(60):
        low = 80 * (i % 3)
        pixels.append(np.random.default_rng([9, i]).integers(low, low + 80, (32, 32, 3)))
    settings = tower_settings(dict(width=24, depth=1, epochs=60, batch=12, lr=3e-3))
    tower = TextTower(build_tokenizer(texts), 48, settings)
    dual = DualEncoder(image, facts, tower)
    fit_text_tower(tower, texts, dual.images(torch.tensor(np.stack(pixels), dtype=torch.uint8)), settings)
    return save_dual(dual, tmp_path_factory.mktemp("dual"), dict(settings=settings))


def test_a_student_learns_classes_from_words(images, encoder, tmp_path, capsys):
    """No label teaches (alpha is 1): what the student knows of the classes came from their words."""
    (words := tmp_path / "words.csv").write_text("".join(f"{name};{text}\n" for name, text in WORDS.items()))
    job = JOB | dict(teacher=f"clip:{encoder}", out=tmp_path / "mine")
    assert api.distill(images, classes=words, dry_run=True, **job) is None
    assert not (tmp_path / "mine").exists()
    result = api.distill(images, classes=words, alpha=1.0, **job)
    assert "c1 = dark, c2 = grey, c3 = light" in capsys.readouterr().out
    rows = result.table().set_index("model")
    assert rows.top1["teacher"] > 0.9 and rows.top1["taught"] > 0.9
    card = Card.read(result.folder("teacher"))
    assert card.words["words"] == WORDS and card.words["teacher"] == f"clip:{encoder}"
    assert card.top1_held_out > 0.9
    assert "dark" in (result.folder("teacher") / "README.md").read_text()
    seen = predict(result.folder("teacher"), [images / "c3" / "0.png"], top=1)  # a model like others
    assert seen["class"].tolist() == ["c3"]
    again = api.distill(images, classes=words, alpha=1.0, **job)  # nothing is trained twice
    assert again.table().equals(result.table())
    with pytest.raises(VitdistillError, match="words, weights or another .*c1: 'dark' then, 'black' now"):
        api.distill(images, classes=WORDS | dict(c1="black"), alpha=1.0, **job)


def test_words_that_say_little_are_refused(images, encoder, tmp_path):
    """Those of other classes: each picture is taken for another."""
    swapped = dict(c1="light", c2="dark", c3="grey")
    with pytest.raises(VitdistillError, match="clip:.* has only 0.0% of .* give better ones by --classes"):
        api.distill(images, **JOB, teacher=f"clip:{encoder}", classes=swapped, out=tmp_path / "mine")


def test_a_model_of_open_clip_teaches(images, tmp_path, monkeypatch):
    """Its answers are CLIP's own, from a model folder that any run reads."""
    (tmp_path / "tiny-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    clip = open_clip.create_model("tiny-clip").eval()
    torch.save(clip.state_dict(), tmp_path / "tiny.pt")
    monkeypatch.chdir(tmp_path)
    job = JOB | dict(teacher="clip:tiny-clip/tiny.pt", out=tmp_path / "mine", classes=WORDS,
                     allow_untrained=True)
    with mock.patch("vitdistill.launch.runner.run", side_effect=VitdistillError("a student")), \
            pytest.raises(VitdistillError, match="a student"):
        api.distill(images, **job)
    folder = tmp_path / "mine/work/teacher/model"
    assert len(Card.read(folder).words["templates"]) == 7
    assert Card.read(folder).constants[0] == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)  # CLIP's own
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    pixels = torch.rand(4, 3, 32, 32)
    tokenizer = open_clip.get_tokenizer("tiny-clip")
    head = open_clip.build_zero_shot_classifier(clip, tokenizer, [*WORDS.values()],
                                                open_clip.SIMPLE_IMAGENET_TEMPLATES)
    with torch.no_grad():
        expected = clip.logit_scale.exp() * clip.encode_image(pixels, normalize=True) @ head
        assert torch.allclose(model(pixels), expected, atol=1e-4)


@pytest.fixture(scope="module")
def photos(images, tmp_path_factory):
    """The same pictures in folders that say nothing: two depths, one of them called unlabelled."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    for n, file in enumerate(sorted(images.glob("*/*.png"))):
        place = folder / ("2025" if n % 3 else "unlabelled/a")
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place / f"{n}.png")
    return folder


def right(model, images):
    """The share of the labelled pictures that a model names by the words of their class."""
    seen = predict(model, sorted(images.glob("*/*.png")), top=1)
    return np.mean([WORDS[Path(path).parent.name] == name for path, name in zip(seen.path, seen["class"])])


def test_a_student_learns_without_any_label(photos, images, encoder, tmp_path, capsys):
    """What it knows of the pictures' classes came from their names alone; no number on labels is told."""
    (names := tmp_path / "names.txt").write_text("light\ndark\ngrey\n")
    job = JOB | dict(teacher=f"clip:{encoder}", classes=names, out=tmp_path / "mine", seeds=2)
    assert api.distill(photos, dry_run=True, **job) is None and not (tmp_path / "mine").exists()
    result = api.distill(photos, **job)
    said = capsys.readouterr().out
    learned = int(re.search(r"learned from (\d+) images", said)[1])
    assert "120 images without labels" in said and 84 <= learned < 120
    assert not re.search(r"top-1|minus|% of the test images|points \(", said)
    assert result.runs().keys() == {"teacher", "taught"}
    rows = result.table().set_index("model")
    assert rows.agrees["taught"] > 0.9 and rows.images["taught"] == 120 - learned and "top1" not in rows
    run, given = (result.runs()[name][1] for name in ("taught", "teacher"))
    mine, theirs = (read_predictions(one, "val").set_index("image") for one in (run, given))
    assert (mine.label == -1).all() and len(mine) == 120 - learned
    agree = [agreements([given], one, "val")["agree"] for one in result.runs()["taught"].values()]
    assert rows.agrees["taught"] == pytest.approx(np.mean(agree))
    assert agree[0] == (mine.decision == theirs.decision.loc[mine.index]).mean()
    for model in ("taught", "teacher"):
        assert right(result.folder(model), images) > 0.9
    results = [name for name, value in run.result.items() if value]
    measured = {*run.metrics().dropna(axis=1, how="all"), *results}
    assert not [name for name in measured if "top1" in name]
    page = (result.out / "mine.html").read_text()
    assert f"learned from {learned} images" in page and "svg" not in page  # there is nothing to draw
    assert len(result.pictures(4).axes) == 4 and result.curves() is None
    [row, _] = measure(result.folder(), ["int8"])  # its size and time all the same
    assert row.accuracy is None and row.mb > 0
    assert api.distill(photos, **job).table().equals(result.table())  # nothing is trained twice
    with pytest.raises(VitdistillError, match="other words"):
        api.distill(photos, **job | dict(classes=[*WORDS.values(), "pink"]))


def test_labels_that_come_later_measure_it(photos, images, encoder, tmp_path):
    """The classes stand in the order of folders, so a labelled folder fits a student that had none."""
    names = ["light", "dark", "grey"]
    result = api.distill(photos, **JOB, teacher=f"clip:{encoder}", classes=names, out=tmp_path / "mine")
    for folder in images.iterdir():
        for part in ("train", "val"):
            shutil.copytree(folder, tmp_path / "labelled" / part / WORDS[folder.name])
    share = right(result.folder(), images)
    assert evaluate(result.folder(), tmp_path / "labelled").accuracy == pytest.approx(share)
    [row] = measure(result.folder(), data=tmp_path / "labelled")
    assert row.images == 120 and row.accuracy == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("given, message", [
    (dict(teacher="vit_tiny_patch16_224", classes=None), "--teacher clip:MODEL/WEIGHTS --classes FILE"),
    (dict(classes=None), "not two folders of images.* --classes FILE"),
    (dict(classes=["dark"]), "names 1 class: name two or more"),
    (dict(classes=["dark", "2025"]), "not two folders of images"),
    (dict(unlabelled=True, classes=None), "none has a label"),
    (dict(unlabelled="/"), "no labels either"),
    (dict(labels="labels.csv", unlabelled=True), "holds your images with labels"),
    (dict(distillation="none"), "no labels, and distillation = 'none' has no teacher to answer instead"),
    (dict(distillation="bce"), "no teacher to answer instead"),
    (dict(distillation="dkd"), "needs the label of each image"),
    (dict(distillation="rld"), "needs the label of each image"),
    (dict(alpha=0), "alpha = 0 is about labels"),
    (dict(class_weights="balanced"), "class_weights = 'balanced' is about labels"),
    (dict(drop_duplicates=True), "there are no test images"),
    (dict(class_names=["a", "b"]), "name the classes by classes"),
])
def test_what_needs_labels_is_refused(given, message, photos, encoder, tmp_path):
    job = JOB | dict(teacher=f"clip:{encoder}", classes=[*WORDS.values()], out=tmp_path / "mine") | given
    if job.get("unlabelled") is True:
        job["unlabelled"] = photos
    with pytest.raises(VitdistillError, match=message):
        api.distill(photos, **job)
    assert not (tmp_path / "mine/runs").exists()


def test_folders_that_are_no_classes(images, encoder, tmp_path):
    """Two folders whose names are none of the classes: the user says whether they are labels."""
    job = JOB | dict(teacher=f"clip:{encoder}", classes=["dark", "light"], out=tmp_path / "mine",
                     dry_run=True)
    with pytest.raises(VitdistillError, match=f"folders .c1, c2, c3. .*add --unlabelled {images}"):
        api.distill(images, **job)
    assert api.distill(images, **job, unlabelled=images) is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(VitdistillError, match="holds no file"):
        api.distill(tmp_path / "empty", **job)
    shutil.copy(images / "c1" / "0.png", tmp_path / "empty")
    with pytest.raises(VitdistillError, match="give 10 or more"):
        api.distill(tmp_path / "empty", **job)


@pytest.mark.parametrize("given, message", [
    (dict(teacher="clip:ViT-B-33/openai"), "did you mean 'ViT-B-32'"),
    (dict(teacher="clip:ViT-B-32"), "names no weights"),
    (dict(teacher="clip"), "clip:MODEL/WEIGHTS"),
    (dict(teacher="clip:"), "clip:MODEL/WEIGHTS"),
    (dict(classes=dict(c4="x")), "'c4' is no folder of images: did you mean 'c3'"),
    (dict(classes=dict(c1="grey", c2="Grey")), "both 'grey' in words"),
    (dict(classes="nowhere.csv"), "no file of words"),
    (dict(teacher_size=64), "takes images of 32 px"),
    (dict(teacher="vit_tiny_patch16_224", classes=WORDS), "is for a teacher by words"),
])
def test_bad_input_is_one_sentence(given, message, images, encoder, tmp_path):
    with pytest.raises(VitdistillError, match=message):
        api.distill(images, **JOB | dict(teacher=f"clip:{encoder}", out=tmp_path / "mine") | given)
    assert not (tmp_path / "mine/runs").exists()


def test_what_is_missing_is_named(images, tmp_path, monkeypatch):
    """The extra, and weights that are not here while no hub answers."""
    with monkeypatch.context() as offline:
        offline.setattr("open_clip.factory.download_pretrained", lambda *given, **more: 1 / 0)
        with pytest.raises(VitdistillError, match="name a file of its weights .* clip:ViT-B-32/FILE"):
            api.distill(images, **JOB, teacher="clip:ViT-B-32/laion2b_s34b_b79k", out=tmp_path / "mine")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *given: None)
    with pytest.raises(VitdistillError, match=r"needs the package open_clip, .*'vitdistill\[captions\]'"):
        api.distill(images, **JOB, teacher="clip:ViT-B-32/openai", out=tmp_path / "mine")
