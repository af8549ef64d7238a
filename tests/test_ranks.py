"""The result does not depend on the number of ranks."""
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch

from conftest import PYTHON, assert_same_losses, elsewhere, environment, on_ranks, run_of, train_command
from conftest import wait_until
from vitdistill.config import save
from vitdistill.launch.runner import rank_command


def test_ranks_give_the_same_losses(tiny, tmp_path):
    """1, 2 and 8 gloo ranks: twenty fp32 steps, each a whole epoch of 287 images (uneven over 8), the same to
    1e-5."""
    config = replace(tiny, epochs=20, batch_size=512, checkpoint_every=20, evaluate_every=20)
    runs = on_ranks(config, tmp_path, 1, 2, 8)
    one, *others = runs
    weights = [safetensors.torch.load_file(run.model / "model.safetensors") for run in runs]
    first, last = one.metrics().train_loss.iloc[[0, -1]]
    assert last < first - 0.05  # it learned: the losses are not trivially equal
    for other, state in zip(others, weights[1:]):
        assert_same_losses(other, one)
        assert all((state[k] - weights[0][k]).abs().max() < 1e-4 for k in state)


@pytest.mark.parametrize("objective", ["hard", "dist"])
def test_ranks_give_the_same_with_all_of_a_recipe(recipe, tmp_path, objective):
    """Mixing, average, clipping; classes weighed, or relations across a batch; the last batch is uneven."""
    still = {**recipe.student_kwargs, "drop_path_rate": 0.0}  # what a rank drops is drawn by rank
    config = replace(recipe, student_kwargs=still, batch_size=48, epochs=2, lr=1e-4, distillation=objective,
                     class_weights="balanced" if objective == "hard" else "")
    one, *others = on_ranks(config, tmp_path, 1, 2, 8)
    for other in others:
        assert_same_losses(other, one)
        averages = [run.checkpoint()["average"] for run in (one, other)]
        assert all((averages[0][name] - averages[1][name]).abs().max() < 1e-4 for name in averages[0])


def test_uneven_last_batch_is_weighted(tiny, tmp_path):
    """Batches of 64 from 287 images leave 31, over 2 ranks 16 and 15: still the gradient of the global mean.

    These are new processes: forks of one have the same hashes of strings, and the same state of numpy's
    generator."""
    assert_same_losses(*on_ranks(tiny, tmp_path, 1, 2, python=PYTHON))


LATE = """
import sys, time
from datetime import timedelta
import torch.distributed.distributed_c10d as c10d
from vitdistill.train import ranks, loop as train
file, patience = sys.argv[1:]
c10d._get_default_timeout = lambda backend: timedelta(seconds=5)
finish = train.finish
train.finish = lambda *args: (time.sleep(10), finish(*args))
ranks.PATIENCE = timedelta(seconds=int(patience))
sys.exit(train.main(["--config", file]))
"""


def test_ranks_wait_for_one_that_finishes(tiny, tmp_path):
    """Rank 0 takes 10 s to finish: beyond torch's patience, 5 s, not ours; beyond ours too, there is a
    sentence."""
    (script := tmp_path / "late.py").write_text(LATE)
    for patience, failed in ((60, False), (5, True)):
        config = elsewhere(replace(tiny, epochs=1), tmp_path / str(patience))
        file = save(config, tmp_path / f"{patience}.yaml")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run([*torchrun, script, file, str(patience)], env=environment(),
                              capture_output=True, text=True, timeout=240)
        assert bool(done.returncode) == failed, done.stderr[-2000:]
    assert "[rank 1] rank 1 waited 5 s for the others and gave up: see in the log" in done.stderr
    assert "[rank 1] Traceback" not in done.stderr


@pytest.mark.slow
def test_resume_on_other_ranks_says_so(tiny, tmp_path):
    """A run begun by one process goes on with two."""
    file, config = tmp_path / "c.yaml", replace(tiny, epochs=40)
    one = subprocess.Popen(train_command(save(config, file)), env=environment(), stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
    assert wait_until(lambda: run_of(config).epochs_done >= 2, 90)
    one.kill()
    one.wait()
    done = subprocess.run(train_command(file, 2), env=environment(), capture_output=True, text=True,
                          timeout=240)
    assert done.returncode == 0 and "trained on 1 rank(s): the last bits may differ" in done.stdout
    assert list(run_of(config).metrics().epoch) == list(range(40))


@pytest.mark.slow
def test_two_nodes_meet(tiny, tmp_path):
    """Two torchruns on this machine meet by the c10d rendezvous and give the losses of one process."""
    alone = elsewhere(tiny, tmp_path / "alone")
    together = elsewhere(tiny, tmp_path / "together")
    subprocess.run(train_command(save(alone, tmp_path / "alone.yaml")), env=environment(), check=True,
                   capture_output=True, timeout=120)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    file = save(replace(together, nnodes=2, rdzv_endpoint=f"localhost:{port}"), tmp_path / "together.yaml")
    command, _ = rank_command(replace(together, nnodes=2, rdzv_endpoint=f"localhost:{port}"), file, 1)
    started = dict(env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    nodes = [subprocess.Popen(command, **started) for _ in range(2)]
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said[0][-2000:]
    assert_same_losses(run_of(together), run_of(alone))
