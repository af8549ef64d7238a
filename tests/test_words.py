"""A teacher that knows the classes by their names alone: a student learns them from its answers."""
import json
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vitdistill import api
from vitdistill.base import VitdistillError
from vitdistill.deploy.predict import predict
from vitdistill.teachers.card import Card

pytest.importorskip("transformers", reason="the extra captions is not installed")
open_clip = pytest.importorskip("open_clip", reason="the extra captions is not installed")
from vitdistill.tasks.captions import build_tokenizer  # noqa: E402
from vitdistill.tasks.encoders import DualEncoder, TextTower, fit_text_tower, image_tower  # noqa: E402
from vitdistill.tasks.encoders import save_dual, tower_settings  # noqa: E402

VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
WORDS = dict(c1="dark", c2="grey", c3="light")
TINY = dict(embed_dim=16, vision_cfg=dict(image_size=32, layers=1, width=32, head_width=16, patch_size=16),
            text_cfg=dict(context_length=32, vocab_size=49408, width=32, heads=2, layers=1))
JOB = dict(student="vit_tiny_patch16_224", student_kwargs=VIT, epochs=12, image_size=32, nproc=1, lr=3e-3)


@pytest.fixture(autouse=True)
def known_speed(monkeypatch):
    for room in ("api", "launch.images"):
        monkeypatch.setattr(f"vitdistill.{room}.seconds_an_image", lambda *given, **more: 0.001)


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
    pixels = [np.random.default_rng([9, i]).integers(80 * (i % 3), 80 * (i % 3) + 80, (32, 32, 3)) for i in range(60)]
    settings = tower_settings(dict(width=24, depth=1, epochs=60, batch=12, lr=3e-3))
    tower = TextTower(build_tokenizer(texts), 48, settings)
    dual = DualEncoder(image, facts, tower)
    fit_text_tower(tower, texts, dual.images(torch.tensor(np.stack(pixels), dtype=torch.uint8)), settings)
    return save_dual(dual, tmp_path_factory.mktemp("dual"), dict(settings=settings))


def test_a_student_learns_classes_from_words(images, encoder, tmp_path, capsys):
    """No label teaches (alpha is 1): what the student knows of the classes came from their words."""
    (words := tmp_path / "words.csv").write_text("".join(f"{name};{text}\n" for name, text in WORDS.items()))
    job = JOB | dict(teacher=f"clip:{encoder}", out=tmp_path / "mine")
    assert api.distill(images, classes=words, dry_run=True, **job) is None and not (tmp_path / "mine").exists()
    result = api.distill(images, classes=words, alpha=1.0, **job)
    assert "c1 = dark, c2 = grey, c3 = light" in capsys.readouterr().out
    rows = result.table().set_index("model")
    assert rows.top1["teacher"] > 0.9 and rows.top1["taught"] > 0.9
    card = Card.read(result.folder("teacher"))
    assert card.words["words"] == WORDS and card.words["teacher"] == f"clip:{encoder}" and card.top1_held_out > 0.9
    assert "dark" in (result.folder("teacher") / "README.md").read_text()
    seen = predict(result.folder("teacher"), [images / "c3" / "0.png"], top=1)  # the teacher is a model like others
    assert seen["class"].tolist() == ["c3"]
    again = api.distill(images, classes=words, alpha=1.0, **job)  # nothing is trained twice
    assert again.table().equals(result.table())
    with pytest.raises(VitdistillError, match="other words or another teacher .*c1: 'dark' then, 'black' now"):
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
    job = JOB | dict(teacher="clip:tiny-clip/tiny.pt", out=tmp_path / "mine", classes=WORDS, allow_untrained=True)
    with mock.patch("vitdistill.launch.queue.launch", side_effect=VitdistillError("a student")), \
            pytest.raises(VitdistillError, match="a student"):
        api.distill(images, **job)
    folder = tmp_path / "mine/work/teacher/model"
    assert len(Card.read(folder).words["templates"]) == 7
    assert Card.read(folder).constants[0] == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)  # CLIP's own
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    pixels, tokenizer = torch.rand(4, 3, 32, 32), open_clip.get_tokenizer("tiny-clip")
    head = open_clip.build_zero_shot_classifier(clip, tokenizer, [*WORDS.values()],
                                                open_clip.SIMPLE_IMAGENET_TEMPLATES)
    with torch.no_grad():
        expected = clip.logit_scale.exp() * clip.encode_image(pixels, normalize=True) @ head
        assert torch.allclose(model(pixels), expected, atol=1e-4)


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
        with pytest.raises(VitdistillError, match="name a file of its weights as teacher, clip:ViT-B-32/FILE"):
            api.distill(images, **JOB, teacher="clip:ViT-B-32/laion2b_s34b_b79k", out=tmp_path / "mine")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *given: None)
    with pytest.raises(VitdistillError, match=r"needs the package open_clip, .*'vitdistill\[captions\]'"):
        api.distill(images, **JOB, teacher="clip:ViT-B-32/openai", out=tmp_path / "mine")
