"""The result does not depend on the number of ranks."""
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import safetensors.torch

from conftest import PYTHON, ROOT, TINY, assert_same_losses, elsewhere, environment, in_turn, on_ranks
from conftest import recipe_of, run_of, torchrun, train_command, wait_until
from vitdistill.config import save
from vitdistill.launch.processes import Launch
from vitdistill.train.loop import train


@pytest.fixture(scope="module")
def ranked(alike, teacher, tmp_path_factory):
    """The runs of all tests below, by the number of ranks and by name: each number is launched once."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny = replace(alike, teacher_weights=teacher)
    still = {**TINY, "drop_path_rate": 0.0}  # what a rank drops is drawn by rank
    recipe = replace(recipe_of(tiny), student_kwargs=still, lr=1e-4)
    large = dict(
        whole=replace(tiny, epochs=20, batch_size=512, checkpoint_every=20, evaluate_every=20),
        hard=replace(recipe, batch_size=48, epochs=2, class_weights="balanced"),
        dist=replace(recipe, batch_size=48, epochs=2, distillation="dist"))
    some = dict(unlabelled="0:900", unlabelled_share=0.4, epochs=3, distillation="soft", label_smoothing=0.1)
    small = dict(unlabelled=replace(tiny, **some), mixed=replace(recipe, batch_size=48, **some))
    once = replace(tiny, epochs=1, data_fraction=0.1)
    configs = {1: large | small, 2: large | small | dict(once=once), 8: large}
    return {ranks: in_turn(given, folder / str(ranks), ranks) for ranks, given in configs.items()}


def test_ranks_give_the_same_losses(ranked):
    """1, 2 and 8 gloo ranks: twenty fp32 steps, each a whole epoch of 287 images (uneven over 8), the same to
    1e-5."""
    one, *others = [ranked[ranks]["whole"] for ranks in (1, 2, 8)]
    weights = [safetensors.torch.load_file(run.model / "model.safetensors") for run in (one, *others)]
    first, last = one.metrics().train_loss.iloc[[0, -1]]
    assert last < first - 0.05  # it learned: the losses are not trivially equal
    for other, state in zip(others, weights[1:]):
        assert_same_losses(other, one)
        assert all((state[k] - weights[0][k]).abs().max() < 1e-4 for k in state)


@pytest.mark.parametrize("objective", ["hard", "dist"])
def test_ranks_give_the_same_with_all_of_a_recipe(ranked, objective):
    """Mixing, average, clipping; classes weighed, or relations across a batch; the last batch is uneven."""
    one, *others = [ranked[ranks][objective] for ranks in (1, 2, 8)]
    for other in others:
        assert_same_losses(other, one)
        averages = [run.checkpoint()["average"] for run in (one, other)]
        assert all((averages[0][name] - averages[1][name]).abs().max() < 1e-4 for name in averages[0])


@pytest.mark.parametrize("name", ["unlabelled", "mixed"])
def test_ranks_share_images_without_labels(ranked, name):
    """Some rows of each batch have no label, on one rank more of them than on another: the losses agree to
    1e-5."""
    one, two = (ranked[ranks][name] for ranks in (1, 2))
    assert_same_losses(one, two)
    assert one.metrics().train_top1.round(5).equals(two.metrics().train_top1.round(5))


def test_one_pass_of_the_teacher_serves_hard_and_soft_students(ranked, alike, teacher, tmp_path):
    """Whichever is first, also on two ranks, the others ask nothing; each ends with the weights that it has
    alone."""
    once = replace(alike, teacher_weights=teacher, epochs=1, data_fraction=0.1)

    def run(name, distillation):
        return train(elsewhere(replace(once, distillation=distillation), tmp_path / name))

    def later(first, kind):  # beside the first one's teacher
        own = tmp_path / f"{first.config.distillation}-{kind}"
        return train(replace(first.config, distillation=kind, runs_dir=str(own / "runs"),
                             work_dir=str(own / "work")))

    with mock.patch("vitdistill.teachers.answers.keeps_both_kinds", lambda *_: False):  # a memo of one kind
        alone = {kind: run(f"alone-{kind}", kind) for kind in ("hard", "soft")}
    assert len(list(tmp_path.glob("alone-*/teacher/memo-*.bin"))) == 2
    hard, soft = ranked[2]["once"], run("first", "soft")
    assert hard.metrics().memo_hit_rate[0] == soft.metrics().memo_hit_rate[0] == 0
    assert soft.result["weights_hash"] == alone["soft"].result["weights_hash"]
    for first, kind in ((hard, "soft"), (soft, "hard")):
        its = later(first, kind)
        assert its.metrics().memo_hit_rate[0] == 1, kind
        assert its.result["weights_hash"] == alone[kind].result["weights_hash"], kind


def test_uneven_last_batch_is_weighted(tiny, tmp_path):
    """Batches of 64 from 287 images leave 31, over 2 ranks 16 and 15: still the gradient of the global mean.

    The two are new processes: forks of one have the same hashes of strings, and the same state of numpy's
    generator."""
    two, = on_ranks(tiny, tmp_path, 2, python=PYTHON)
    assert_same_losses(train(elsewhere(tiny, tmp_path / "one")), two)


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
    started = {}
    for patience in (60, 5):
        config = elsewhere(replace(tiny, epochs=1), tmp_path / str(patience))
        file = save(config, tmp_path / f"{patience}.yaml")
        command = [sys.executable, *torchrun(2), script, file, str(patience)]
        started[patience] = subprocess.Popen(command, env=environment(), text=True, stdout=subprocess.DEVNULL,
                                             stderr=subprocess.PIPE)
    printed = {patience: process.communicate(timeout=240)[1] for patience, process in started.items()}
    assert started[60].returncode == 0, printed[60][-2000:]
    assert started[5].returncode != 0
    assert "[rank 1] rank 1 waited 5 s for the others and gave up: see in the log" in printed[5]
    assert "[rank 1] Traceback" not in printed[5]


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
    both = replace(together, nnodes=2, rdzv_endpoint=f"localhost:{port}")
    command = [sys.executable, "-m", "torch.distributed.run", *Launch(both, file, 1, 1).options]
    started = dict(env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    nodes = [subprocess.Popen(command, **started) for _ in range(2)]
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said[0][-2000:]
    assert_same_losses(run_of(together), run_of(alone))


COPY = """
import sys
sys.path.insert(0, "mine")
import vitdistill
from vitdistill.config import preset
from vitdistill.launch import run
config = preset("demo", "baseline", student="resnet10t", data_fraction=0.05, epochs=1, threads=1)
print(vitdistill.__version__, run(config, show=False).environment["vitdistill"])
"""


def test_ranks_import_the_copy_that_their_launcher_imported(tmp_path):
    """A program puts a copy of the package into sys.path, as in a git worktree, on Kaggle or Colab, while
    another one is installed."""
    (tmp_path / ".vitdistill").touch()
    (tmp_path / "program.py").write_text(COPY)
    shutil.copytree(ROOT / "vitdistill", tmp_path / "mine/vitdistill")
    shutil.copytree(ROOT / "nbs/presets", tmp_path / "mine/nbs/presets")
    (tmp_path / "mine/vitdistill/__init__.py").write_text('__version__ = "9.9.9"\n')
    done = subprocess.run([PYTHON, "program.py"], cwd=tmp_path, env=environment(), text=True,
                          capture_output=True, timeout=240)
    assert done.stdout == "9.9.9 9.9.9\n", done.stderr[-2000:]
