"""Processes that are really killed: nothing runs on, nothing is lost, the rerun ends where it would have
ended."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest

from conftest import PYTHON, ROOT, assert_same, elsewhere, environment, processes_mentioning, run_of
from conftest import train_command
from conftest import wait_until
from vitdistill.config import save
from vitdistill.train.loop import train

# jupyter_client frees the ports that it picked for a kernel before the kernel binds them: one beside it may
# be quicker
NO_KERNEL = re.compile("Kernel died before replying|Kernel didn't respond in")


def start(config, file, ranks=1, python=PYTHON):  # a process that is killed can be no fork
    command = train_command(save(config, file), ranks, python=python)
    return subprocess.Popen(command, env=environment(), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def kill(process):
    process.kill()
    process.wait()


def test_killed_run_ends_as_one_left_alone(recipe, tmp_path):
    """SIGKILL in mid-epoch, all of a recipe on; started again, it leaves the same record and weights, bit for
    bit.

    Its images are augmented by two processes, those of the one left alone by itself."""
    config = replace(recipe, epochs=8, batch_size=16)
    one = train(elsewhere(config, tmp_path / "alone"))
    cut = replace(elsewhere(config, tmp_path / "cut"), workers=2)
    process = start(cut, tmp_path / "cut.yaml")
    assert wait_until(lambda: run_of(cut).folder.exists() and run_of(cut).epochs_done >= 3, 90)
    time.sleep(np.random.default_rng(0).uniform(0, 0.2))
    kill(process)
    assert run_of(cut).status == "interrupted"
    metrics = run_of(cut).folder / "metrics.csv"
    metrics.write_text(metrics.read_text()[:-1])  # an editor drops the last newline
    assert start(cut, tmp_path / "cut.yaml", python=sys.executable).wait(120) == 0
    two = run_of(cut)
    assert_same(one, two)
    assert one.metrics().ema_test_top1.notna().all() and len(set(one.metrics().train_loss)) == 8
    predictions = [np.load(run.folder / "predictions.npz").values() for run in (one, two)]
    assert all(np.array_equal(a, b) for a, b in zip(*predictions))


@pytest.mark.slow
def test_four_ranks_resume_to_the_same_bytes(recipe, tmp_path):
    """All of a recipe on. From three ranks on, the order of sums shows in their bits: four that are killed
    end as four left alone."""
    config = replace(recipe, epochs=8, batch_size=32)
    alone = elsewhere(config, tmp_path / "alone")
    cut = elsewhere(config, tmp_path / "cut")
    assert start(alone, tmp_path / "alone.yaml", ranks=4).wait(240) == 0
    process = start(cut, tmp_path / "cut.yaml", ranks=4)
    assert wait_until(lambda: run_of(cut).folder.exists() and run_of(cut).epochs_done >= 3, 120)
    ranks = psutil.Process(process.pid).children(recursive=True)
    next(p for p in ranks if p.environ().get("RANK") == "0").kill()
    assert process.wait(60) and 3 <= run_of(cut).epochs_done < 8
    assert start(cut, tmp_path / "cut.yaml", ranks=4).wait(240) == 0
    assert_same(run_of(alone), run_of(cut))
    assert len(run_of(cut).metrics()) == 8


def test_a_signal_saves_first(tiny, tmp_path):
    """Checkpoints an hour apart: told to end, a run loses no epoch that it has behind it."""
    config = replace(tiny, epochs=500, checkpoint_seconds=3600.0)
    process = start(config, tmp_path / "c.yaml")
    try:
        assert wait_until(lambda: run_of(config).epochs_done >= 4, 90)
        assert run_of(config).checkpoint()["epochs"] == 1
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert run_of(config).checkpoint()["epochs"] >= run_of(config).epochs_done - 1 >= 3
    assert run_of(config).status == "interrupted"  # and the lock left nothing stale


def command(config, file, *before, options=()):
    """`vitdistill train` of a config as a user starts it, after the words `before`."""
    words = [*before, PYTHON, "-m", "vitdistill", "train", "--config", str(save(config, file)), *options]

    def heed():  # a background job ignores SIGINT, and its children inherit that
        return signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(words, env=environment(), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, preexec_fn=heed)


def children(process):
    return psutil.Process(process.pid).children(recursive=True)


AS_PROCESS_ONE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
if not shutil.which("unshare") or subprocess.run([*AS_PROCESS_ONE, "true"], capture_output=True).returncode:
    AS_PROCESS_ONE = []  # needs root on Linux


def test_docker_stop_saves_first(tiny, tmp_path):
    """SIGTERM for the command, which is process 1 of a container: it ends in less than the ten seconds that
    docker waits, and has lost no epoch."""
    config = replace(tiny, epochs=500, checkpoint_seconds=3600.0)
    process = command(config, tmp_path / "c.yaml", *AS_PROCESS_ONE)
    try:
        assert wait_until(lambda: run_of(config).epochs_done >= 4, 90)
        first = children(process)[0] if AS_PROCESS_ONE else psutil.Process(process.pid)
        first.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=10)[0]
        assert process.returncode == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert run_of(config).checkpoint()["epochs"] >= run_of(config).epochs_done - 1 >= 3
    assert "interrupted; run this again: it goes on after epoch" in printed and "Traceback" not in printed


def test_a_second_interrupt_does_not_wait(tiny, tmp_path):
    """A rank hangs; Ctrl-C waits for it, a second one does not, and nothing is left."""
    config = replace(tiny, epochs=500)
    process = command(config, tmp_path / "c.yaml")
    try:
        assert wait_until(lambda: run_of(config).epochs_done >= 2, 90)
        rank, = [p for p in children(process) if "vitdistill.train" in " ".join(p.cmdline())]
        rank.suspend()
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(2) == 128 + signal.SIGINT
        rank.resume()
        printed = process.communicate(timeout=10)[0]
        assert "ended at once" in printed and "Traceback" not in printed
        assert wait_until(lambda: not processes_mentioning(str(tmp_path / "tiny")), 10)
    finally:
        process.kill()


@pytest.mark.slow
def test_killed_at_random_moments(tiny, tmp_path):
    """SIGKILL at 20 random moments, in the loop, a checkpoint, a memo write: then the bytes of a run left
    alone."""
    config = replace(tiny, epochs=60, batch_size=16)
    alone = elsewhere(config, tmp_path / "alone")
    cut = elsewhere(config, tmp_path / "cut")
    assert start(alone, tmp_path / "alone.yaml").wait(300) == 0
    random = np.random.default_rng(0)
    alive = 0
    for _ in range(20):
        before = run_of(cut).epochs_done if run_of(cut).folder.exists() else 0
        process = start(cut, tmp_path / "cut.yaml")

        def further():
            return run_of(cut).folder.exists() and run_of(cut).epochs_done > before

        wait_until(lambda: process.poll() is not None or further(), 90)
        time.sleep(random.uniform(0, 0.5))
        alive += process.poll() is None
        kill(process)
    assert alive >= 10  # else nothing was struck
    assert start(cut, tmp_path / "cut.yaml").wait(300) == 0
    assert_same(run_of(alone), run_of(cut))


def test_killed_rank_ends_the_others(tiny, tmp_path):
    """One of two ranks dies: torchrun ends the other within 30 s, and the message says which it was."""
    config = replace(tiny, epochs=500)
    process = command(config, tmp_path / "ranks.yaml", options=["--nproc", "2"])
    try:
        assert wait_until(lambda: run_of(config).epochs_done >= 2, 120)
        ranks = [p for p in children(process) if "RANK" in p.environ()]
        next(p for p in ranks if p.environ()["RANK"] == "1").kill()
        printed = process.communicate(timeout=30)[0]
        assert process.returncode == 1 and "rank 1 was killed by signal 9" in printed, printed
        assert "Traceback" not in printed
        assert not processes_mentioning(str(tmp_path / "tiny"))
    finally:
        process.kill()


@pytest.mark.parametrize("end", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
                                 pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_killed_papermill_leaves_no_process(tmp_path, end):
    """Papermill is killed or interrupted: within 10 s neither its kernel nor torchrun nor a rank is left."""
    notebook = ROOT / "nbs/experiments/e01_baseline_resnet50.ipynb"
    command = [PYTHON, "-m", "papermill", str(notebook), str(tmp_path / "out.ipynb"), "--cwd", str(ROOT),
               "-p", "student", "resnet18", "-p", "epochs", "500", "-p", "runs_dir", str(tmp_path / "runs"),
               "-p", "work_dir", str(tmp_path / "work")]
    # a shell's background job ignores SIGINT, and its children inherit that

    def heed():
        return signal.signal(signal.SIGINT, signal.SIG_DFL)

    log = tmp_path / "papermill.log"

    def trains():
        return list((tmp_path / "runs").glob("*/metrics.csv"))

    def begin():
        with open(log, "w") as said:
            return subprocess.Popen(command, env=environment(), stdout=said, stderr=said, preexec_fn=heed)

    process = begin()
    try:
        wait_until(lambda: trains() or process.poll() is not None, 150)
        if NO_KERNEL.search(log.read_text()):
            process = begin()
            wait_until(lambda: trains() or process.poll() is not None, 150)
        status = f"no epoch of it yet, and papermill's status is {process.poll()}"
        assert trains(), f"{status}: {log.read_text()[-3000:]}"
        kernels = [p.pid for p in psutil.Process(process.pid).children()]
        assert kernels and processes_mentioning(str(tmp_path / "work"))
    finally:
        process.send_signal(end)

    def lives(pid):
        return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

    def alive():
        return processes_mentioning(str(tmp_path / "work")) + [k for k in kernels if lives(k)]

    try:
        assert wait_until(lambda: not alive(), 10), alive()
    finally:
        kill(process)


AS_ROOT = os.geteuid() == 0 and sys.platform == "linux"


@pytest.mark.skipif(not AS_ROOT, reason="mounting a small disk needs root on Linux")
def test_full_disk_keeps_the_last_checkpoint(tiny, tmp_path):
    """The disk fills up while a checkpoint is written: one sentence, the previous one whole, and the rerun
    ends."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this container may not mount a tmpfs")
    try:
        config = replace(tiny, work_dir=str(disk), epochs=6)
        process = start(config, tmp_path / "c.yaml", python=sys.executable)
        assert wait_until(lambda: list(disk.glob("*/checkpoint.pt")), 90)
        ballast = open(disk / "ballast", "wb", buffering=0)
        try:
            while True:
                ballast.write(b"0" * 4096)
        except OSError:
            pass  # full
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 2 and "no space left on the device" in said and "Traceback" not in said
        assert run_of(config).checkpoint()["epochs"] >= 1
        ballast.close()
        (disk / "ballast").unlink()
        assert len(train(config).metrics()) == 6
    finally:
        subprocess.run(["umount", "-l", str(disk)])
