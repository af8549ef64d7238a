"""The full path on real CIFAR-100 with a real ViT-Tiny: a few steps, and the numbers that can be checked."""
import runpy
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import ROOT
from vitdistill.study.agreement import class_names
from vitdistill.config import Config
from vitdistill.data.datasets import cifar100_constants, load_data, read_pickle
from vitdistill.data.duplicates import same_images
from vitdistill.data.files import in_folders
from vitdistill.launch.runner import run
from vitdistill.runs import read_arrays
from vitdistill.train.setup import auto_precision
from vitdistill.teachers.teacher import adopt

HELD_OUT = "44000:50000"  # what the weights file was not trained on: see the data's README


@pytest.fixture(scope="module")
def cifar(real_data):
    return load_data(Config(dataset="cifar100", data_root=str(real_data)))


def test_numbers_of_cifar100(cifar):
    assert cifar.train_images.shape == (50_000, 32, 32, 3) and cifar.test_images.shape == (10_000, 32, 32, 3)
    assert (torch.bincount(cifar.train_labels) == 500).all()
    assert (torch.bincount(cifar.test_labels) == 100).all()
    mean, std = replace(cifar, constants=None).mean_std
    assert np.round(mean, 4).tolist() == list(cifar100_constants[0])
    assert np.abs(np.array(std) - cifar100_constants[1]).max() < 0.011  # the paper's: another estimate
    assert len(set(cifar.classes)) == 100 and cifar.classes[0] == "apple"


def test_superclasses_are_those_of_the_data(real_data):
    """reports/reference/cifar100_superclasses.csv says what the official files say."""
    meta, train = (read_pickle(real_data / "cifar-100-python" / name) for name in ("meta", "train"))
    table = class_names("cifar100", 100)
    assert table["class"].tolist() == list(meta["fine_label_names"])
    labels = zip(train["fine_labels"], train["coarse_labels"], strict=True)
    named = {(fine, meta["coarse_label_names"][coarse]) for fine, coarse in labels}
    assert named == set(table["superclass"].items())


def test_real_teacher_teaches_real_images(cifar, real_data, tmp_path):
    """The fine-tuned ViT-Tiny at the study's 160 px: its card, its health, a small ResNet taught for a few
    steps."""
    teacher = Config(dataset="cifar100", data_root=str(real_data), student="vit_tiny_patch16_224",
                     student_size=160, student_kwargs=dict(img_size=224, dynamic_img_size=True),
                     val_rows=HELD_OUT)
    weights = real_data / "weights/vit_tiny_patch16_224.cifar100.safetensors"
    card = adopt(teacher, weights, tmp_path / "teacher", cifar, precision=auto_precision("cpu"), most=300)
    assert card.top1_held_out > 0.7 and card.n_held_out == 6000 and card.n_train == 44_000
    student = replace(teacher, experiment="distilled", student="resnet10t", student_size=0,
                      student_kwargs={}, teacher=teacher.student, teacher_kwargs=teacher.student_kwargs,
                      teacher_size=160, teacher_weights=str(tmp_path / "teacher"), distillation="hard",
                      epochs=2, evaluate_every=2, batch_size=32, data_fraction=0.005, lr=0.02, device="cpu",
                      runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"))
    record = run(student)
    loss = record.metrics().train_loss
    assert record.result["teacher_top1"] > 0.7
    assert loss.iloc[0] == pytest.approx(np.log(100), abs=1.5) and loss.iloc[1] < loss.iloc[0]
    predictions = read_arrays(record.folder / "predictions.npz")
    assert [len(predictions[f"{part}_label"]) for part in ("test", "val", "train")] == [10_000, 6000, 200]


@pytest.mark.parametrize("name, train, test, twice", [("plants", 400, 400, 0), ("digits", 400, 400, 0),
                                                      ("stranger", 429, 106, 5)])
def test_the_image_sets_of_the_costs_are_written(real_data, tmp_path, monkeypatch, name, train, test, twice):
    """docs/photos.py: no image is in train and in the test but for a stranger's five copies."""
    monkeypatch.setenv("VITDISTILL_DATA", str(real_data))
    runpy.run_path(str(ROOT / "docs/photos.py"))["main"](name, str(tmp_path / name))
    parts = [in_folders(tmp_path / name, part) for part in ("train", "val")]
    assert [*map(len, parts)] == [train, test]
    assert sum(pair.is_copy for pair in same_images(*parts)) == twice
    unlabelled = [*(tmp_path / name / "unlabelled").glob("*")]
    assert len(unlabelled) == (500 if name == "stranger" else 0)
