"""What several tests share: tiny runs, subprocesses, the real data where it lies."""
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from vitdistill.config import Config, preset, repo_root
from vitdistill.runs import Run
from vitdistill.setup import resolve

ROOT = repo_root(Path(__file__).parent)
TINY = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: not in `make test`, but in `make test-all`")
    config.addinivalue_line("markers", "cuda: needs a GPU, and is skipped without one (`make gpu`, `pytest -m cuda`)")


@pytest.fixture
def tiny(tmp_path):
    """A config of a small vision transformer on a fifth of the digits, taught by an untrained one: seconds a run."""
    return Config(dataset="digits", data_fraction=0.2, student="vit_tiny_patch16_224", student_kwargs=TINY,
                  teacher="vit_tiny_patch16_224", teacher_kwargs=TINY, teacher_size=32, allow_untrained=True,
                  distillation="hard", epochs=3, batch_size=64, optimizer="adamw", lr=1e-3, precision="fp32",
                  teacher_precision="fp32", device="cpu", threads=1, checkpoint_seconds=0.0,
                  runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"))


@pytest.fixture
def recipe(tiny):
    """The same with mixing, a weight average, clipped gradients and dropped paths: the preset of that name."""
    ours = ("data_fraction", "epochs", "precision", "teacher_precision", "device", "threads", "checkpoint_seconds",
            "runs_dir", "work_dir")
    return preset("recipe", "distilled", **{name: getattr(tiny, name) for name in ours})


def elsewhere(config, folder):
    """The same run with its record and heavy files in another folder."""
    return replace(config, runs_dir=str(folder / "runs"), work_dir=str(folder / "work"))


def run_of(config):
    return Run.of(resolve(config))


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def train_command(file, ranks=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "vitdistill.train", "--config", str(file)]


def wait_until(condition, seconds, poll=0.05):
    """Whether `condition()` came true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(poll)
    return bool(condition())


def processes_mentioning(text):
    """Living processes whose command line holds `text`."""
    import psutil

    def matches(process):
        try:
            return process.status() != psutil.STATUS_ZOMBIE and text in " ".join(process.cmdline())
        except psutil.Error:
            return False

    return [p for p in psutil.process_iter() if p.pid != os.getpid() and matches(p)]


@pytest.fixture(scope="session")
def real_data():
    """The folder of real CIFAR-100 and of pretrained weights; skips where VITDISTILL_DATA names none."""
    folder = os.environ.get("VITDISTILL_DATA", "")
    if not (Path(folder) / "cifar-100-python").is_dir() or not folder:
        pytest.skip("VITDISTILL_DATA names no folder with cifar-100-python/ and weights/")
    return Path(folder)
