"""Steps of `make gpu` whose way on a GPU the dry run doesn't take."""
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import checks
import pandas as pd
import pytest
import steps

from vitdistill.train.setup import resolve


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
    monkeypatch.setattr("vitdistill.train.setup.compiler_missing", lambda device: "")
    ranks = mock.patch.dict(os.environ, RANK="0", WORLD_SIZE=str(world))
    gpu = dict(is_available=lambda: True, is_bf16_supported=lambda including_emulation: True)
    with ranks, mock.patch.multiple("torch.cuda", **gpu), pytest.raises(Asked):
        checks.check_resume("cuda", tmp_path, world, **given)


def test_a_gradient_that_differs_between_devices_is_seen(monkeypatch, tmp_path):
    """Each device has logits of its own: a shared one would add up both gradients and see no difference."""
    calls, made = itertools.count(), checks.criterion

    def uneven(config):
        own = made(config)
        forward = own.forward

        def with_another_slope(heads, batch):
            total = heads[0].sum()
            zero = next(calls) * (total - total.detach())
            return forward(heads, batch)[0] + zero, {}

        own.forward = with_another_slope
        return own

    assert "objectives differ" in checks.check_losses("cpu", tmp_path)
    monkeypatch.setattr(checks, "criterion", uneven)
    with pytest.raises(AssertionError, match="loss or gradient differs"):
        checks.check_losses("cpu", tmp_path)


@pytest.fixture
def job(tmp_path):
    """A study that is given twenty seconds."""
    before = signal.getsignal(signal.SIGTERM)
    yield steps.Job("study", tmp_path, "cpu", True, 20)
    signal.signal(signal.SIGTERM, before)


def ran(job, monkeypatch, script, epochs_done=3, status="interrupted"):
    """What the study found of a pair whose processes are these scripts and whose records say so."""
    row = dict(test_top1=0.1, seconds=2.0, images_per_second=10.0, memo_hit_rate=float("nan"))
    metrics = pd.DataFrame([row])
    record = SimpleNamespace(epochs_done=epochs_done, status=status, folder=job.work, metrics=lambda: metrics)
    monkeypatch.setattr(steps, "run_of", lambda _: record)
    monkeypatch.setattr(steps, "pair_of", lambda job: {"plain": SimpleNamespace(keep_checkpoints=[2, 8])})
    monkeypatch.setattr(job, "train", lambda *_: subprocess.Popen([sys.executable, "-c", script]))
    (job.work / "plain.log").touch()
    def decide(run, epochs):
        (file := run.folder / f"predictions-{epochs:04d}.npz").touch()
        return file
    monkeypatch.setattr(steps, "predictions_at", decide)
    steps.step_study(job)
    found = job.base / "found.jsonl"
    return [json.loads(line)["value"] for line in found.read_text().splitlines()] if found.is_file() else []


SIGNALLED = "import os, signal, time; signal.signal(15, lambda *_: os._exit(143)); time.sleep(60)"


@pytest.mark.parametrize(("script", "good"), [("", True), (SIGNALLED, True), ("raise SystemExit(143)", True),
                                              ("raise SystemExit(1)", False)])
def test_a_run_that_was_asked_to_end_has_not_failed(script, good, job, monkeypatch):
    """Nor has one that was gone before it was looked at; decisions are kept of checkpoints that are whole."""
    job.end = time.monotonic() + 16.5
    decided, told = ran(job, monkeypatch, script)
    assert (not job.failed) == good and decided == "predictions-0002.npz"
    assert ("1 epochs" in told) == good and ("FAILED" in told) != good


def test_a_whole_run_is_not_started_again(job, monkeypatch):
    """An earlier call trained it to its end."""
    assert ran(job, monkeypatch, "raise SystemExit(1)", status="done") == [] and not job.failed


def test_the_study_waits_for_its_data(job, tmp_path):
    """They come in parts, while it waits."""
    job.data = str(tmp_path)
    names = "cifar-100-python/train", "cifar-100-python/test", steps.WEIGHTS
    def bring():
        for name in names:
            time.sleep(0.2)
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(bring)
        assert steps.wait_for_data(job) == tmp_path / steps.WEIGHTS
        assert all((tmp_path / name).is_file() for name in names)
    (tmp_path / names[1]).unlink()
    job.end = time.monotonic() + 15.5
    with pytest.raises(FileNotFoundError, match="cifar-100-python/test"):
        steps.wait_for_data(job)


def test_a_folder_of_an_earlier_call_is_found(tmp_path):
    """With the study's checkpoints."""
    for exists in (False, True):
        job = steps.Job("study", tmp_path, "cpu", True, 20)
        assert (job.work / "checkpoint.pt").exists() == exists
        (job.work / "checkpoint.pt").touch()
