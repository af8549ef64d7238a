"""The result does not depend on the number of ranks."""
import subprocess
from dataclasses import replace

import pytest
import safetensors.torch

from conftest import elsewhere, environment, run_of, train_command
from vitdistill.config import save


def test_ranks_give_the_same_losses(tiny, tmp_path):
    """1, 2 and 8 gloo ranks: twenty fp32 steps, each a whole epoch of 287 images (uneven over 8), the same to 1e-5."""
    config = replace(tiny, epochs=20, batch_size=512, checkpoint_every=20)
    runs = []
    for ranks in (1, 2, 8):
        here = elsewhere(config, tmp_path / str(ranks))
        file = save(here, tmp_path / f"{ranks}.yaml")
        done = subprocess.run(train_command(file, ranks), env=environment(), capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        runs.append(run_of(here))
    one, *others = [run.metrics() for run in runs]
    weights = [safetensors.torch.load_file(run.model / "model.safetensors") for run in runs]
    assert one.train_loss.iloc[-1] < one.train_loss.iloc[0] - 0.05  # it learned: the losses are not trivially equal
    for other, state in zip(others, weights[1:]):
        assert (other.train_loss - one.train_loss).abs().max() < 1e-5
        assert all((state[k] - weights[0][k]).abs().max() < 1e-4 for k in state)


def test_uneven_last_batch_is_weighted(tiny, tmp_path):
    """Batches of 64 from 287 images leave 31, over 2 ranks 16 and 15: still the gradient of the global mean."""
    losses = []
    for ranks in (1, 2):
        here = elsewhere(tiny, tmp_path / str(ranks))
        subprocess.run(train_command(save(here, tmp_path / f"{ranks}.yaml"), ranks), env=environment(), check=True, capture_output=True, timeout=240)
        losses.append(run_of(here).metrics().train_loss)
    assert (losses[0] - losses[1]).abs().max() < 1e-5
