"""What a user adds from outside the package: a teacher that is a function of pixels."""
from dataclasses import replace
from unittest import mock

import pandas as pd
import torch

from conftest import elsewhere
from vitdistill.data.datasets import digest
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
