"""Steps of `make gpu` whose way on a GPU the dry run doesn't take."""
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import checks
import pytest
import steps

from vitdistill.config import Config
from vitdistill.setup import resolve


class Asked(Exception):
    """What a rank would be asked was found fit."""


@pytest.mark.parametrize("mode", ["none", "default"])
def test_two_ranks_are_asked_what_a_run_takes(mode, monkeypatch, tmp_path):
    """Compiled batch norm is refused among several GPUs: there the student has none."""
    def start(config, log, world):
        resolve(config)
        raise Asked

    monkeypatch.setattr(checks, "start_ranks", start)
    monkeypatch.setattr("vitdistill.setup.compiler_missing", lambda device: "")
    ranks = mock.patch.dict(os.environ, RANK="0", WORLD_SIZE="2")
    gpu = dict(is_available=lambda: True, is_bf16_supported=lambda including_emulation: True)
    with ranks, mock.patch.multiple("torch.cuda", **gpu), pytest.raises(Asked):
        checks.check_resume("cuda", tmp_path, 2, mode)


@pytest.mark.parametrize(("epochs", "status"), [(1, 0), (2, None)])
def test_a_whole_run_ends_by_itself(epochs, status, monkeypatch, tmp_path):
    """With its result, some time after its last epoch; one that has more epochs than are wanted makes room."""
    seen, job = [], steps.Job("study", tmp_path, "cpu", True, 60, "")
    monkeypatch.setattr(steps, "arms", lambda job: {})
    monkeypatch.setattr(steps, "seeds_of", lambda *_: [("one", Config(epochs=epochs), 1)])
    monkeypatch.setattr(steps, "run_of", lambda _: SimpleNamespace(epochs_done=1, status="running", work=tmp_path))
    monkeypatch.setattr(steps, "close", lambda job, name, process, config: seen.append(process.poll()))
    command = [sys.executable, "-c", "import time; time.sleep(2)"]
    monkeypatch.setattr(job, "train", lambda *_: subprocess.Popen(command))
    steps.step_study(job)
    assert seen == [status]
