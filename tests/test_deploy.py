"""What a trained model says of images: known answers, whichever way it is stored."""
import json
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from vitdistill.job import result
from vitdistill.config import Config
from vitdistill.data.datasets import load_digits
from vitdistill.data.files import read_image
from vitdistill.data.views import normalize
from vitdistill.deploy import measure as room
from vitdistill.deploy.evaluate import evaluate
from vitdistill.deploy.predict import Predictor, from_folder, from_onnx, predict
from vitdistill.models.create import create, save_model
from vitdistill.teachers.card import Card

NO_CHANGE = (0.0,) * 3, (1.0,) * 3


@pytest.fixture
def photo(tmp_path):
    """A noisy photograph, wider than high, in a folder of its class."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    (tmp_path / "photos/a").mkdir(parents=True)
    file = tmp_path / "photos/a/1.png"
    Image.fromarray(pixels).save(file)
    return file


def test_an_image_is_cropped_at_the_side_of_training_and_then_resized(photo):
    """A teacher of 224 px that was trained on crops of 32: what it sees has the detail of 32."""
    seen = []

    def forward(pixels):
        seen.append(pixels)
        return (torch.tensor([[1.0, 0.0]]),)

    model = Predictor("", ["a", "b"], (8, 4), NO_CHANGE, forward)
    expected = normalize(read_image(photo, 8)[None].permute(0, 3, 1, 2), *NO_CHANGE, 4)
    at_once = normalize(read_image(photo, 4)[None].permute(0, 3, 1, 2), *NO_CHANGE, 4)
    assert not torch.allclose(expected, at_once, atol=0.01)
    predict(model, photo)
    evaluate(model, photo.parent.parent)
    for pixels in seen:
        torch.testing.assert_close(pixels, expected)
    assert len(seen) == 2


@pytest.mark.parametrize("turns", [True, False])
def test_a_stored_model_turns_photographs_as_its_training_did(turns, tmp_path):
    student = create("resnet10t", 10, 32)
    save_model(student, tmp_path, {}, [*"0123456789"], "", NO_CHANGE, 32)
    card = Card.of(Config(dataset="digits", exif_orientation=turns), load_digits(), 32, NO_CHANGE)
    card.write(tmp_path)
    assert from_folder(tmp_path).exif_orientation is turns

    about = dict(classes=json.dumps(["a", "b"]), image_size="8", exif_orientation=str(turns))
    session = SimpleNamespace(get_modelmeta=lambda: SimpleNamespace(custom_metadata_map=about),
                              get_outputs=lambda: [SimpleNamespace(name="probabilities")],
                              get_inputs=lambda: [SimpleNamespace(shape=[1, 3, 8, 8])])
    onnxruntime = SimpleNamespace(InferenceSession=lambda *_, **__: session)
    no_check = mock.patch("vitdistill.deploy.predict.require")
    with mock.patch.dict("sys.modules", onnxruntime=onnxruntime), no_check:
        assert from_onnx(tmp_path / "model.onnx").exif_orientation is turns


def test_int8_is_calibrated_on_images_of_training_between_0_and_1(tmp_path, monkeypatch):
    """Image i is grey i; the first twenty are held out."""
    pytest.importorskip("onnxruntime")
    grey = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 8, 8, 3)
    images = SimpleNamespace(train_images=grey, test_images=grey, test_labels=torch.zeros(40))
    monkeypatch.setattr(room, "load_model", lambda model: SimpleNamespace(sides=(8, 8), name=""))
    monkeypatch.setattr(room, "model_folder", lambda model: tmp_path)
    monkeypatch.setattr(room, "images_of", lambda *given: (images, torch.arange(20, 40)))
    monkeypatch.setattr(room, "export_onnx", lambda folder, file: tmp_path / "model.onnx")
    calibrated = []

    class Enough(Exception):
        """The rest of `measure` is not of interest."""

    def export_int8(file, pixels, to):
        calibrated.append(pixels)
        raise Enough

    monkeypatch.setattr(room, "export_int8", export_int8)
    with pytest.raises(Enough):
        room.measure("model", ["int8"])
    [pixels] = calibrated
    assert pixels.amax((1, 2, 3)).mul(255).round().tolist() == [*range(20, 40)]


def costs(kind, right, labels):
    predicted = np.where(right, labels, 1 - labels)
    model = SimpleNamespace(parameters=1, classes=["cat", "dog"])
    return room._model_costs(model, labels, "", kind, 1.0, 1.0, predicted)


def test_the_worst_class_is_the_one_with_the_fewest_right():
    labels = np.array([0] * 10 + [1] * 10)
    one = costs("fp32", np.array([True] * 9 + [False] + [True] * 3 + [False] * 7), labels)
    assert (one.worst_class, one.worst, one.balanced) == ("dog", 0.3, pytest.approx(0.6))
    assert "dog 30.0%" in room.cost_table([one])


def test_what_int8_loses_is_below_zero(monkeypatch):
    """It has ten images of a hundred wrong that the whole model has right."""
    labels = np.zeros(100, int)
    whole = costs("fp32", np.ones(100, bool), labels)
    int8 = costs("int8", np.arange(100) >= 10, labels)
    first, second, *_ = room.difference_in_words(int8, whole)
    assert first.startswith("int8 minus fp32: -10.0 points (-") and "costs accuracy" in second
    monkeypatch.setattr(result, "measure", lambda *given, **more: [whole, int8])
    row = result.costs_of_model("model")
    assert row["int8_difference"] == pytest.approx(-0.1) and row["int8_low"] < row["int8_high"] < 0
    assert row["int8_top1"] == 0.9
