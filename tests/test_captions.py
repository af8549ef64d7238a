"""Captions from text alone, by the same road as every run: kills, ranks, the command line, a notebook; bad
input."""
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import PYTHON, assert_same, environment, run_of, train_command, wait_until
from test_notebooks import execute
from vitdistill.tasks.captioning import CAPTIONS, caption_files, prepare_captions
from vitdistill.tasks.captions import create_decoder
from vitdistill.cli import main
from vitdistill.base import VitdistillError
from vitdistill.config import Config, save
from vitdistill.data.datasets import load_data
from vitdistill.teachers.encoders import OpenClip
from vitdistill.models.create import create, create_student, save_model
from vitdistill.train.ranks import Ranks
from vitdistill.runs import Run, read_arrays
from vitdistill.train.setup import resolve
from vitdistill.teachers.card import Card
from vitdistill.train.loop import train

pytest.importorskip("transformers", reason="the extra captions is not installed")
pytest.importorskip("open_clip", reason="the extra captions is not installed")
VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
SMALL = dict(n_embd=32, n_layer=1, n_head=2, vocab_size=300)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("captions")


@pytest.fixture(scope="module")
def config(place):
    """A run on digits that takes seconds: an untrained image tower, a text tower that is fitted to it."""
    digits = load_data(Config(dataset="digits"))
    torch.manual_seed(0)
    config = Config(dataset="digits", student="vit_tiny_patch16_224", student_kwargs=VIT)
    model = create_student(config, 10, 32).model
    card = Card.of(Config(dataset="digits"), digits, 32, ((0.5,) * 3,) * 2)
    card = replace(card, image_size=32, train_hash="", images_hash=None)  # it was trained on other images
    card.write(save_model(model, place / "vit", VIT, card.classes, "", card.constants, 32))
    return Config(experiment="captions", dataset="digits", data_fraction=0.3, val_fraction=0.3, clip="own",
                  student_weights=str(place / "vit"), text_tower=dict(width=24, depth=1, epochs=2, batch=50),
                  decoder_kwargs=SMALL, prefix=2, epochs=6, batch_size=64, optimizer="adamw", lr=3e-3,
                  precision="fp32", teacher_precision="fp32", device="cpu", threads=1, checkpoint_seconds=0.0,
                  runs_dir=str(place / "runs"), work_dir=str(place / "work"))


@pytest.fixture(scope="module")
def alone(config):
    return train(config, task=CAPTIONS)


def start(config, file, ranks=1, python=sys.executable):
    command = train_command(save(config, file), ranks, python)
    return subprocess.Popen(command, env=environment(), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def test_killed_run_writes_the_same_captions(config, alone, place):
    """SIGKILL after some epochs; started again it ends with the same decisions, captions and weights, bit for
    bit."""
    dropout = config.decoder_kwargs | dict(resid_pdrop=0.1)
    cut = replace(config, runs_dir=str(place / "cut"), epochs=12, decoder_kwargs=dropout)
    one = train(replace(cut, runs_dir=str(place / "whole")), task=CAPTIONS)
    process = start(cut, place / "cut.yaml", python=PYTHON)
    assert wait_until(lambda: run_of(cut).folder.exists() and run_of(cut).epochs_done >= 3, 60)
    process.kill()
    process.wait()
    assert run_of(cut).status == "interrupted"
    two = train(cut, task=CAPTIONS)
    assert_same(one, two)
    assert len(two.metrics()) == 12 and one.result["examples"] == two.result["examples"]
    arrays = [read_arrays(run.folder / "predictions.npz") for run in (one, two)]
    assert all(np.array_equal(arrays[0][name], arrays[1][name], equal_nan=True) for name in arrays[0])


def test_a_tower_that_saw_the_held_out_images_is_refused(config, place):
    """Its captions would be chosen on images whose labels it knows."""
    digits, constants = load_data(config), ((0.5,) * 3,) * 2
    other = replace(config, student="vit_tiny_patch16_224", student_kwargs=VIT, student_weights="",
                    split_seed=3)
    model = create_student(other, 10, 32).model
    folder = save_model(model, place / "seen", VIT, digits.classes, "", constants, 32)
    Card.of(other, digits, 32, constants).write(folder)
    with pytest.raises(VitdistillError, match="its student_weights'"):
        prepare_captions(replace(config, student_weights=str(place / "seen")), Ranks())


def test_ranks_share_a_batch(config, alone, place):
    """Two ranks read the same rows and noise: the losses are those of one."""
    both = replace(config, runs_dir=str(place / "two"))
    assert start(both, place / "two.yaml", ranks=2).wait(120) == 0
    losses = [run.metrics().train_loss for run in (alone, run_of(both))]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
def test_three_ranks_go_on_to_the_same_weights(config, place):
    """From the checkpoint of epoch 2 of 4: DDP sums gradients in the order of the run that was left alone."""
    three = replace(config, runs_dir=str(place / "three"), epochs=4, keep_checkpoints=[2])
    assert start(three, place / "three.yaml", ranks=3).wait(240) == 0
    alone = run_of(three).result["weights_hash"]
    run = run_of(three)
    (run.folder / "result.json").unlink()
    [kept] = run.work.glob("checkpoint-*2.pt")
    shutil.copy(kept, run.work / "checkpoint.pt")
    assert start(three, place / "three.yaml", ranks=3).wait(240) == 0
    assert run_of(three).result["weights_hash"] == alone


def test_decoder_recovers_its_training_texts(config, place):
    """Ten different texts, no noise: trained long enough, each comes back from its embedding."""
    long = replace(config, runs_dir=str(place / "long"), noise_factor=0.0, epochs=150, evaluate_every=150,
                   lr=5e-3, decoder_kwargs=SMALL | dict(n_embd=64), data_fraction=0.1)
    setup = prepare_captions(resolve(long), Ranks())
    train(long, task=replace(CAPTIONS, prepare=lambda *_: setup))
    said = setup.captions(setup.embeddings)
    assert sum(a == b for a, b in zip(said, setup.texts)) / len(said) > 0.95


def test_noise_and_arms_differ_in_what_they_say(config, place):
    """The deviation is the rule's times the factor; other embeddings and no noise have none of it."""
    def prepared(**fields):
        return prepare_captions(resolve(replace(config, **fields)), Ranks())

    setups = {factor: prepared(noise_factor=factor) for factor in (0.0, 1.0, 3.0)}
    assert setups[0.0].std == 0 and setups[3.0].std == pytest.approx(3 * setups[1.0].about["noise_rule"])
    given = prepared(noise_std=0.2)
    assert given.std == 0.2 and given.about["noise_rule"] == setups[1.0].about["noise_rule"]
    shuffled = prepared(learn_from="shuffled")
    assert not shuffled.embeddings.equal(setups[0.0].embeddings)
    assert shuffled.embeddings.sum(0).allclose(setups[0.0].embeddings.sum(0), atol=1e-3)
    centred = prepared(center=True)
    assert centred.about["gap"]["distance_means"] < setups[0.0].about["gap"]["distance_means"]


@pytest.fixture(scope="module")
def own(alone, place):
    """A text file and a folder of images of one's own, and an encoder: that of the run above."""
    texts, images = place / "texts.txt", place / "images"
    sentences = [f"one sees a {word} {i}\n" for i in range(5) for word in ("cat", "dog", "bird", "fish")]
    texts.write_text("".join(sentences))
    images.mkdir()
    for i in range(3):
        Image.fromarray(np.full((40, 30 + i, 3), 80 * i, np.uint8)).save(images / f"{i}.png")
    (images / "torn.png").write_bytes(b"no image")
    return texts, images, next((place / "work/encoders").glob("*/dual.json")).parent


def options(own, out):
    texts, images, clip = own
    return ["--texts", str(texts), "--images", str(images), "--out", str(out), "--clip", str(clip),
            "--clip_pretrained", "", "--decoder", "", "--decoder_kwargs", json.dumps(SMALL),
            "--noise_std", "0.05", "--epochs", "2", "--lr", "0.003", "--precision", "fp32",
            "--teacher_precision", "fp32", "--device", "cpu"]


def test_command_captions_ones_own_images(own, place, capsys):
    """A caption for each image that can be read, a sentence for the other, and nothing is trained twice."""
    assert main(["captions", *options(own, place / "mine"), "--json"]) == 1
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [row["path"][-5:] for row in rows] == ["0.png", "1.png", "2.png"]
    assert "torn.png can not be read as an image" in said.err
    run, = [Run(file.parent) for file in (place / "mine/runs").glob("*/result.json")]
    assert run.name.startswith("captions-") and run.config.dataset == "texts"
    again = caption_files(run.model, [own[1] / "0.png"])
    assert again.caption.tolist() == [rows[0]["caption"]]


def test_notebook_counts_and_shows_captions(config, alone, place):
    """By papermill: a table of shares and a picture grid."""
    fields = {name: value for name, value in vars(config).items() if value != getattr(Config(), name)}
    fields.pop("experiment")
    fields["epochs"] = 2
    executed = execute("e09_captions", place / "e09.ipynb", preset="captions_demo", **fields)
    text = json.dumps([cell.get("outputs") for cell in executed["cells"]])
    assert "right class" in text and "image/png" in text


@pytest.mark.parametrize("field, value, sentence", [
    ("templates", "plane", "did you mean 'plain'"),
    ("decoder", "nobody/nothing", "name a folder that holds GPT-2"),
    ("val_fraction", 0.0, "no image is held out"),
])
def test_bad_settings_are_refused_in_a_sentence(config, field, value, sentence, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(VitdistillError, match=sentence) as caught:
        prepare_captions(resolve(replace(config, **{field: value})), Ranks())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [
    lambda: create_decoder(Config(decoder="nobody/nothing"), []),
    lambda: OpenClip("ViT-B-32", "laion2b_s34b_b79k"),
    lambda: create("hf-hub:nobody/nothing", 3, 32)], ids=["decoder", "clip", "student"])
def test_without_a_network_nothing_is_tried_again(load, monkeypatch, tmp_path):
    """Five retries of huggingface_hub wait for half a minute."""
    waits = []
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(VitdistillError, match="can not be had|could not be read"):
        load()
    assert not waits


@pytest.mark.parametrize("package", ["transformers", "open_clip"])
def test_a_missing_extra_is_named(config, package, monkeypatch):
    """Each library is asked for where it is used, and the sentence says what to install."""
    from importlib.util import find_spec

    def without(name, *rest):
        return None if name == package else find_spec(name, *rest)

    monkeypatch.setattr("importlib.util.find_spec", without)
    clip = "ViT-B-32" if package == "open_clip" else "own"
    with pytest.raises(VitdistillError, match=rf"needs the package {package}.*'vitdistill\[captions\]'"):
        if clip == "own":
            create_decoder(config, ["a"])
        else:
            prepare_captions(resolve(replace(config, clip=clip)), Ranks())


def test_captions_name_classes_of_cifar(real_data):
    """The official pickles name each image: captions of words, classes and superclasses, and hashes as
    before."""
    from vitdistill.tasks.captioning import image_facts
    config = Config(dataset="cifar100", data_root=str(real_data))
    data = load_data(config)
    train, test = image_facts(config, data)
    assert len(train) == 50000 and len(test) == 10000
    assert {one.name for one in train} == {name.replace("_", " ") for name in data.classes}
