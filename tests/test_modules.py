"""What a user adds from outside the package: a loss, a network, a dataset, a teacher, a study of them."""
import re
import shutil
from dataclasses import replace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from conftest import ROOT, elsewhere
from vitdistill.data.datasets import digest, load_digits
from vitdistill.runs import find_runs
from vitdistill.teachers.teacher import TEACHERS, Teacher, register_teacher
from vitdistill.train.loop import train


class NearestMean(Teacher):
    """Answers with the negative distances of an image to the mean image of each class."""

    size, chunk = 32, 100

    def __init__(self, data):
        labels = data.train_labels
        images = data.train_images.permute(0, 3, 1, 2).float()
        self.means = torch.stack([images[labels == number].mean(0) for number in range(len(data.classes))])
        self.classes, self.hash = data.classes, digest(["nearest mean", self.means])

    def logits(self, pixels):
        return -torch.cdist(pixels.float().flatten(1), self.means.flatten(1)) / 100


def test_a_function_of_pixels_teaches_with_a_memo(alike, tmp_path):
    """It is registered in one place. It is asked about each view once: a student of the same seed and views
    finds all its answers in the memo."""
    untaught = replace(alike, teacher="nearest_mean", teacher_kwargs={}, allow_untrained=False)
    config = elsewhere(untaught, tmp_path)
    with mock.patch.dict(TEACHERS):
        register_teacher("nearest_mean")(lambda data, device: NearestMean(data))
        first = train(config)
        again = train(replace(config, lr=2e-3))
    assert first.config.teacher_hash == "" and 0.7 < first.result["teacher_top1"] < 1
    hits = [pd.read_csv(run.folder / "metrics.csv").memo_hit_rate for run in (first, again)]
    assert hits[0][0] == 0 and (hits[1] == 1).all()


@pytest.fixture
def mine(tmp_path):
    """A folder with the files of the page on extending, and the digits as its arrays."""
    page = (ROOT / "docs/extend.md").read_text()
    digits = load_digits()
    (tmp_path / "mine.py").write_text(re.search(r"```python\n(.*?)```", page, re.S)[1])
    (tmp_path / "mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.S)[1])
    np.savez(tmp_path / "mine.npz", train=digits.train_images, train_labels=digits.train_labels,
             test=digits.test_images, test_labels=digits.test_labels, classes=digits.classes)
    Image.fromarray(digits.test_images[0].numpy()).save(tmp_path / "digit.png")
    return tmp_path


def cli(*words):
    return "-m", "vitdistill.cli", *words


def test_a_file_of_ones_own_from_a_wheel(away, mine):
    """A grid of executed notebooks, a comparison, two ranks and a prediction know what the file registers.
    The wheel's package is the one that runs."""
    away(mine, *cli("grid", "mine.yaml", "--at-once", "1"))
    assert "2 done" in away(mine, *cli("grid", "mine.yaml", "--status"))
    plain, taught = sorted(find_runs(mine / "out/mine/runs"), key=lambda run: run.config.experiment)
    for run in (plain, taught):
        assert run.status == "done" and run.config.modules == "mine.py"
    assert plain.config.modules_hash and taught.result["teacher_top1"] > 0.7
    assert (taught.config.student, taught.config.teacher) == ("tiny_net", "nearest_mean")
    assert "taught" in away(mine, *cli("compare", "mine.yaml"))

    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vitdistill.train"]
    text = (taught.folder / "config.yaml").read_text().replace("out/mine/", "out/two/")
    (mine / "two.yaml").write_text(text)
    away(mine, *ranks, "--config", "two.yaml")
    [two] = find_runs(mine / "out/two/runs")
    assert two.name == taught.name and abs(two.result["test_top1"] - taught.result["test_top1"]) < 0.02

    model = mine / "out/mine/work" / taught.name / "model"
    here = away(mine, *cli("predict", model, "digit.png"))
    elsewhere = shutil.copytree(model, mine.parent / f"{mine.name}-model")
    other = mine.parent / f"{mine.name}-other"
    other.mkdir()
    asked = away(other, *cli("predict", elsewhere, mine / "digit.png"), code=1)
    assert "needs mine.py" in asked and "--modules mine.py" in asked and asked.count("\n") == 1
    given = away(other, *cli("predict", elsewhere, mine / "digit.png", "--modules", mine / "mine.py"))
    assert given.split(",")[4:] == here.split(",")[4:]

    (mine / "mine.py").write_text((mine / "mine.py").read_text() + "\n# edited\n")
    away(mine, *cli("predict", model, "digit.png"), code=1)
    assert "done" not in away(mine, *cli("grid", "mine.yaml", "--status")).replace("0 done", "")
