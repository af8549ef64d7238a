"""What several tests share: tiny runs, subprocesses, the real data where it lies."""
import os
import shutil
import subprocess
import sys
import time
import zipfile
from configparser import ConfigParser
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from forked import leave_the_hub

leave_the_hub()  # before huggingface_hub is imported

from vitdistill.base import repo_root  # noqa: E402
from vitdistill.config import Config, preset, save  # noqa: E402
from vitdistill.runs import Run, RunWriter  # noqa: E402
from vitdistill.train.loop import train  # noqa: E402
from vitdistill.train.setup import resolve  # noqa: E402
from vitdistill.teachers.teacher import untrained  # noqa: E402

ROOT = repo_root(Path(__file__).parent)
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini")
SETTINGS = SETTINGS["DEFAULT"]
PYTHON = os.environ.get("VITDISTILL_PYTHON", sys.executable)  # starts a new process, under forked.py too
LONGEST = ["analysis", "own_images", "kill", "notebooks", "ranks", "deit_figures", "captions", "install",
           "hub", "modules", "pretraining", "real_data", "deit"]
TIMED = ["seconds", "images_per_second", "teacher_seconds", "memo_hit_rate"]
TINY = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: not in `make test`, but in `make test-all`")
    about = "cuda: needs a GPU, and is skipped without one (`make gpu`, `pytest -m cuda`)"
    config.addinivalue_line("markers", about)


def pytest_collection_modifyitems(items):
    """The files that take longest first: of several workers, none idles while another begins one of them."""
    order = {f"test_{name}": n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Random models of a test, and of the fixtures that it sets up, are the same in each run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def alike():
    """What all tiny runs have in common: a small vision transformer on a fifth of the digits, taught by
    another."""
    return Config(dataset="digits", data_fraction=0.2, student="vit_tiny_patch16_224", student_kwargs=TINY,
                  teacher="vit_tiny_patch16_224", teacher_kwargs=TINY, teacher_size=32, allow_untrained=True,
                  distillation="hard", epochs=3, batch_size=64, optimizer="adamw", lr=1e-3, precision="fp32",
                  teacher_precision="fp32", device="cpu", threads=1, checkpoint_seconds=0.0)


@pytest.fixture(scope="session")
def teacher(alike, tmp_path_factory):
    """The folder of a teacher that nobody trained, and that answers many classes all the same."""
    return untrained(alike, tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture
def tiny(alike, teacher, tmp_path):
    """A config whose run takes seconds; its memo lies beside its own copy of the teacher."""
    return elsewhere(replace(alike, teacher_weights=teacher), tmp_path / "tiny")


@pytest.fixture
def recipe(tiny):
    """The same with mixing, a weight average, clipped gradients and dropped paths."""
    return recipe_of(tiny)


def recipe_of(config):
    """The preset of that name, as short and on as few images as a tiny run."""
    ours = ("teacher_weights", "data_fraction", "epochs", "precision", "teacher_precision", "device",
            "threads", "checkpoint_seconds", "runs_dir", "work_dir")
    return preset("recipe", "distilled", **{name: getattr(config, name) for name in ours})


def elsewhere(config, folder):
    """The same run with its record, its heavy files and its teacher, without a memo, in another folder."""
    here = replace(config, runs_dir=str(folder / "runs"), work_dir=str(folder / "work"))
    if not config.teacher_weights:
        return here
    without_memos = shutil.ignore_patterns("memo-*")
    copied = shutil.copytree(config.teacher_weights, folder / "teacher", ignore=without_memos)
    return replace(here, teacher_weights=str(copied))


def run_of(config):
    return Run.of(resolve(config))


def record(config, *arms, metrics=None, **result):
    """A run's folder, without a training; ended if it has a result. `metrics`: a row per epoch."""
    run = RunWriter.of(config)
    save(config, run.folder / "config.yaml")
    frame = pd.DataFrame(dict(epoch=[config.epochs - 1])) if metrics is None else metrics
    frame.to_csv(run.folder / "metrics.csv", index=False)
    for arm in arms:
        run.add_arm(arm)
    if result:
        run.finish(result)
    return run


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def train_command(file, ranks=1, python=sys.executable):
    launcher = torchrun(ranks) if ranks > 1 else []
    return [python, *launcher, "-m", "vitdistill.train", "--config", str(file)]


def torchrun(ranks):
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def on_ranks(config, folder, *counts, python=sys.executable):
    """The finished runs of a config, each on so many gloo ranks."""
    places = [elsewhere(config, folder / str(ranks)) for ranks in counts]
    for ranks, here in zip(counts, places):
        run_ranks(train_command(save(here, folder / f"{ranks}.yaml"), ranks, python=python))
    return [run_of(here) for here in places]


IN_TURN = """
import sys
from torch import distributed
from vitdistill.config import load
from vitdistill.train.loop import train
from vitdistill.train.ranks import start_ranks
ranks = start_ranks("cpu")
for file in sys.argv[1:]:
    train(load(file), ranks)
distributed.destroy_process_group()
"""


def in_turn(configs, folder, ranks):
    """The finished runs of several configs, by name: the same ranks train one after the other."""
    places = {name: elsewhere(config, folder / name) for name, config in configs.items()}
    if ranks == 1:
        return {name: train(here) for name, here in places.items()}
    files = [str(save(here, folder / f"{name}.yaml")) for name, here in places.items()]
    (script := folder / "in_turn.py").write_text(IN_TURN)
    run_ranks([sys.executable, *torchrun(ranks), str(script), *files])
    return {name: run_of(here) for name, here in places.items()}


def run_ranks(command):
    done = subprocess.run(command, env=environment(), text=True, capture_output=True, timeout=480)
    assert done.returncode == 0, done.stderr[-2000:]


def assert_same_losses(one, other, atol=1e-5):
    """Two runs have the same training loss in every epoch, up to `atol`."""
    pd.testing.assert_series_equal(one.metrics().train_loss, other.metrics().train_loss, rtol=0, atol=atol)


def assert_same(one, other):
    """Two runs left the same metrics, but for times, the same weights and the same average of them, bit for
    bit."""
    mine, theirs = (run.metrics().drop(columns=TIMED, errors="ignore") for run in (one, other))
    pd.testing.assert_frame_equal(mine, theirs, check_exact=True)
    assert one.result.get("weights_hash") == other.result.get("weights_hash")
    averages = [run.checkpoint().get("average") or {} for run in (one, other)]
    assert averages[0].keys() == averages[1].keys()
    assert all(averages[0][name].equal(averages[1][name]) for name in averages[0])


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


@pytest.fixture
def known_speed(monkeypatch):
    """A job in this process does not measure how fast its models are, which takes a second each."""
    monkeypatch.setattr("vitdistill.job.clock.seconds_an_image", lambda *given, **more: 0.001)


@pytest.fixture(scope="session")
def real_data():
    """The folder of real CIFAR-100 and of pretrained weights; skips where VITDISTILL_DATA names none."""
    folder = os.environ.get("VITDISTILL_DATA", "")
    if not (Path(folder) / "cifar-100-python").is_dir() or not folder:
        pytest.skip("VITDISTILL_DATA names no folder with cifar-100-python/ and weights/")
    return Path(folder)


def tracked(*folders):
    """Files of the repository, new ones too, as a clone would have them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built from a copy of what is tracked, without a network."""
    source = tmp_path_factory.mktemp("source")
    dist = tmp_path_factory.mktemp("dist")
    heads = ["setup.py", "settings.ini", "README.md", "LICENSE", "MANIFEST.in"]
    for name in tracked(*heads, "vitdistill", *SETTINGS["shipped"].split()):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    build = "import sys, setuptools.build_meta as meta; meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(dist)], cwd=source, check=True, capture_output=True)
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="session")
def away(wheel, tmp_path_factory):
    """Run a command in a folder that is no clone, with the wheel's package before this checkout's on the
    path."""
    overlay = tmp_path_factory.mktemp("overlay")
    with zipfile.ZipFile(wheel) as archive:  # what an installer does with a pure wheel
        archive.extractall(overlay)

    def run(folder, *command, code=0):
        env = os.environ | {"PYTHONPATH": str(overlay), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, command)]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == code, done.stderr[-3000:]
        return done.stdout if code == 0 else done.stderr

    return run
