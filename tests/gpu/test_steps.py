"""Steps of `make gpu` whose way on a GPU the dry run doesn't take."""
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import checks
import pytest
import steps

from vitdistill.config import Config
from vitdistill.setup import resolve


class Asked(Exception):
    """What a rank would be asked was found fit."""


@pytest.mark.parametrize(("world", "given"), [(2, dict(mode="none")), (2, dict(mode="default")),
                                              (1, dict(mode="auto", made=checks.recipe))])
def test_ranks_are_asked_what_a_run_takes(world, given, monkeypatch, tmp_path):
    """Compiled batch norm is refused among several GPUs: there the student has none."""
    def start(config, log, world):
        resolve(config)
        raise Asked

    monkeypatch.setattr(checks, "start_ranks", start)
    monkeypatch.setattr("vitdistill.setup.compiler_missing", lambda device: "")
    ranks = mock.patch.dict(os.environ, RANK="0", WORLD_SIZE=str(world))
    gpu = dict(is_available=lambda: True, is_bf16_supported=lambda including_emulation: True)
    with ranks, mock.patch.multiple("torch.cuda", **gpu), pytest.raises(Asked):
        checks.check_resume("cuda", tmp_path, world, **given)


@pytest.fixture
def study(monkeypatch, tmp_path):
    """A study of one run, whose process sleeps and whose record is the test's to say."""
    before = signal.getsignal(signal.SIGTERM)
    job, seen = steps.Job("study", tmp_path, "cpu", True, 20, ""), []
    monkeypatch.setattr(steps, "arms", lambda job: {})
    monkeypatch.setattr(steps, "close", lambda job, name, process, _: (seen.append(process.poll()), process.kill()))
    def train(seconds, epochs, target, epochs_done, status="interrupted"):
        record = lambda _: SimpleNamespace(epochs_done=epochs_done(), status=status, work=tmp_path)
        command = [sys.executable, "-c", f"import time; time.sleep({seconds})"]
        monkeypatch.setattr(steps, "run_of", record)
        monkeypatch.setattr(steps, "seeds_of", lambda *_: [("one", Config(epochs=epochs), target)])
        monkeypatch.setattr(job, "train", lambda *_: subprocess.Popen(command))
        steps.step_study(job)
        return seen

    yield train
    signal.signal(signal.SIGTERM, before)


def passed(per_second):
    """How many so far, of so many a second."""
    begun = time.monotonic()
    return lambda: int(per_second * (time.monotonic() - begun))


@pytest.mark.parametrize(("epochs", "status"), [(1, 0), (5, None)])
def test_a_whole_run_ends_by_itself(epochs, status, study):
    """With its result, some time after its last epoch; one that has more epochs than are wanted makes room."""
    so_far = passed(2)
    assert study(2, epochs, 1, lambda: min(1, so_far())) == [status]


@pytest.mark.parametrize(("epochs", "status", "seen"),
                         [(9, "interrupted", []), (5, "done", []), (5, "interrupted", [0])])
def test_what_an_earlier_call_trained_is_not_started_again(epochs, status, seen, study):
    """A run that made room, or has its result; without that it may lack what comes after the last epoch."""
    assert study(0.1, epochs, 5, lambda: 5, status) == seen


def test_epochs_of_an_earlier_call_are_no_rate(study, monkeypatch, tmp_path):
    """A study that goes on after 1,000 epochs counts its own, ten a second, from when they come."""
    monkeypatch.setattr(steps, "WINDOW", 0.5)
    so_far = passed(10)
    study(3, 5000, 2000, lambda: 1000 + so_far())
    rates = [json.loads(line)["value"] for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert rates and max(rates) < 2 * 10 * 50_000


def test_a_folder_of_an_earlier_call_is_found(tmp_path):
    """With the study's checkpoints."""
    for exists in (False, True):
        job = steps.Job("study", tmp_path, "cpu", True, 20, "")
        assert (job.work / "checkpoint.pt").exists() == exists
        (job.work / "checkpoint.pt").touch()
