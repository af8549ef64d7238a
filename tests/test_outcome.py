"""The decisions of a checkpoint, as a run of real training leaves it: those of its epoch, written by the command."""
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from conftest import ROOT, elsewhere, environment
from vitdistill.outcome import head_accuracies, main
from vitdistill.train import train


def test_decisions_of_a_checkpoint(tiny, tmp_path):
    """Of the last epoch they are the finished run's, bit for bit; of an earlier one, those that its metrics counted."""
    config = replace(tiny, epochs=2, keep_checkpoints=[1], distillation="none", data_fraction=1.0)
    run = train(elsewhere(config, tmp_path))
    command = [sys.executable, "-m", "vitdistill.outcome", run.folder, "--epochs", "1"]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True)
    assert main([str(run.folder), "--record", str(tmp_path / "record")]) == 0
    last, done = np.load(tmp_path / "record" / "predictions-0002.npz"), np.load(run.folder / "predictions.npz")
    assert {"test_image", "test_label", "test_class_decision", "test_class_top5", "test_class_logits"} <= set(last)
    for name in set(last) & set(done):
        assert np.array_equal(last[name], done[name]), name
    first = head_accuracies(np.load(run.folder / "predictions-0001.npz"))["class"]
    told = run.metrics().test_top1
    assert [first, head_accuracies(last)["class"]] == pytest.approx(list(told), abs=1e-5) and told[0] != told[1]
