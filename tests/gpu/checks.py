"""What must hold on a GPU: each check takes a device and a folder, and returns what it saw in a sentence or
raises.

`test_cuda.py` calls them on a GPU, `steps.py` on a GPU or, at toy size, on a CPU. `python tests/gpu/checks.py
FILE` is a rank of theirs: `vitdistill.train` among the peers that RANK and WORLD_SIZE tell of, all on the
first GPU, by gloo, since NCCL refuses two processes on one.
"""
import copy
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from vitdistill.teachers.answers import Answers, memo_key, open_memo  # noqa: E402
from vitdistill.train import loop as train  # noqa: E402
from vitdistill.config import Config, preset, save  # noqa: E402
from vitdistill.bench.contenders import bench_setup, fill_randomly, random_data  # noqa: E402
from vitdistill.models.layers import DeformableMerging  # noqa: E402
from vitdistill.losses import OBJECTIVES, Batch, criterion  # noqa: E402
from vitdistill.models.create import Student, create  # noqa: E402
from vitdistill.train.ranks import Ranks, check_device  # noqa: E402
from vitdistill.runs import find_runs  # noqa: E402
from vitdistill.train.optimize import create_optimizer  # noqa: E402
from vitdistill.tasks.can import CAN  # noqa: E402
from vitdistill.teachers.teacher import balance  # noqa: E402
from vitdistill.train.step import CapturedStep, create_step  # noqa: E402
from vitdistill.train.loop import Meanwhile, batches, create_objective, train_epoch  # noqa: E402
from vitdistill.data.views import Plan, Views, epoch_plan, normalize  # noqa: E402

TINY = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
SMALLEST = TINY | dict(depth=0, global_pool="avg", class_token=False)  # patches and a head: soon compiled
TIMED = ["seconds", "images_per_second", "teacher_seconds", "memo_hit_rate"]


def pair(device, folder, **given):
    """A config whose teacher is a tiny untrained vision transformer, its student a ResNet-18 (on a CPU a tiny
    one)."""
    small = dict(student="vit_tiny_patch16_224", student_kwargs=SMALLEST, data_fraction=0.2, threads=1)
    values = dict(dataset="digits", student="resnet18", teacher="vit_tiny_patch16_224", teacher_kwargs=TINY,
                  teacher_size=32, allow_untrained=True, distillation="hard", batch_size=64, lr=0.01,
                  precision="fp32", teacher_precision="fp32", compile="none", device=device,
                  checkpoint_seconds=0.0, runs_dir=f"{folder}/runs", work_dir=f"{folder}/work")
    return Config(**values | (small if device == "cpu" else {}) | given)


def recipe(device, folder, **given):
    """The config of preset `recipe`: two processes augment."""
    ours = "device", "threads", "data_fraction", "precision", "teacher_precision", "checkpoint_seconds"
    places = {name: getattr(pair(device, folder), name) for name in (*ours, "runs_dir", "work_dir")}
    return preset("recipe", "distilled", **places | dict(workers=2) | given)


def alone(device):
    """The one rank on a device, as `start_ranks` makes it."""
    return Ranks(device="cuda:0" if device == "cuda" else device)


def check_views(device, folder):
    """Views of a batch, and what a model is given of them, are the CPU's."""
    images = random_data(64).train_images
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(64, (50,), generator=g)
    view = torch.randint(162, (50,), generator=g)
    here = Views(images, 4)(rows, view)
    there = Views(images, 4, device)(rows.to(device), view.to(device))
    assert there.cpu().equal(here)
    worst = 0.0
    for size in (0, 48):
        one, two = (normalize(x, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), size).cpu() for x in (here, there))
        worst = max(worst, (one - two).abs().max().item())
    assert worst < 1e-4, f"normalized pixels differ by {worst:.2g}"
    return f"bytes are equal; normalized and resized they differ by {worst:.1g} at most"


def check_losses(device, folder):
    """Loss and gradient of each objective, whatever kind of answer it wants, are the CPU's."""
    g, worst = torch.Generator().manual_seed(0), 0.0
    logits, answer = (torch.randn(32, 100, generator=g) for _ in range(2))
    targets = torch.randint(100, (32,), generator=g)
    cases = [(name, 0) for name in OBJECTIVES]
    cases += [(name, 8) for name in ("soft", "hard+soft")]
    for name, top_k in cases:
        teacher = "vit_tiny_patch16_224" if OBJECTIVES[name].wants else ""
        config = Config(distillation=name, teacher=teacher, soft_top_k=top_k)
        found = []
        for place in ("cpu", device):
            own = criterion(config).to(place)
            z = logits.to(place, copy=True).requires_grad_()  # a leaf on each place
            said = own.wants.make(answer.to(place)) if own.wants else None
            loss, _ = own((z,), Batch(z, targets.to(place), said, epoch=5))
            loss.backward()
            found.append((loss.detach().cpu(), z.grad.cpu()))
        (loss, gradient), (its_loss, its_gradient) = found
        pairs = (loss, its_loss), (gradient, its_gradient)
        difference = max(((a - b).norm() / a.norm()).item() for a, b in pairs)
        assert difference < 1e-3, f"{name}: loss or gradient differs by {difference:.2g} of it"
        worst = max(worst, difference)
    return f"{len(cases)} objectives differ by {worst:.1g} of loss and gradient at most"


def check_litv2(device, folder):
    """LITv2's logits and gradients, those of its offsets too, are the CPU's, and nearly those under bf16
    autocast."""
    torch.manual_seed(0)
    small = dict(embed_dim=16, depths=(1, 1, 1), num_heads=(2, 4, 8), windows=(0, 2, 1))
    model = create("litv2_cifar", 10, 32, **small).train()
    for module in model.modules():
        if isinstance(module, DeformableMerging):
            torch.nn.init.normal_(module.offset.weight, std=0.05)
    images = torch.randn(16, 3, 32, 32)
    targets = torch.arange(16) % 10
    found = []
    for place, low in (("cpu", False), (device, False), (device, True)):
        its = copy.deepcopy(model).to(place)
        with torch.autocast(device, torch.bfloat16, enabled=low):
            loss = torch.nn.functional.cross_entropy(its(images.to(place)), targets.to(place))
        loss.backward()
        parts = [loss[None].detach(), *[p.grad.flatten() for p in its.parameters()]]
        found.append(torch.cat(parts).float().cpu())
    same, close = (torch.cosine_similarity(found[0], other, dim=0).item() for other in found[1:])
    assert same > 0.9999 and close > 0.99, f"cosines of the gradients: fp32 {same:.5f}, bf16 {close:.3f}"
    return f"cosines of loss and gradients with the CPU's: fp32 {same:.5f}, bf16 {close:.4f}"


def check_pretraining(device, folder):
    """CAN draws the CPU's masks and noise, and has its loss and gradients; under bf16 autocast nearly."""
    own = dict(projector=[64, 16], decoder=[32, 1, 2], normalize_targets=True)
    can = criterion(Config(distillation="can", objective_kwargs=own), CAN)
    torch.manual_seed(0)
    whole = can.objective(can.fit(Student(create("vit_tiny_patch16_224", 10, 32, **TINY))), can)
    pixels = torch.randn(32, 3, 32, 32)
    image = torch.arange(16)
    found = []
    for place, low in (("cpu", False), (device, False), (device, True)):
        its = copy.deepcopy(whole).to(place)
        batch = Batch(pixels.to(place), torch.zeros(16, device=place), epoch=3, image=image.to(place))
        drawn = its.draw(batch)
        with torch.autocast(device, torch.bfloat16, enabled=low):
            loss = its(batch).loss
        loss.backward()
        learned = [p.grad.flatten() for p in its.parameters() if p.grad is not None]
        loss_and_gradients = torch.cat([loss[None].detach(), *learned]).float().cpu()
        found.append((drawn.keep.cpu(), drawn.noise.cpu(), loss_and_gradients))
    (keep, noise, first), (its_keep, its_noise, second), (*_, third) = found
    assert its_keep.equal(keep) and (its_noise - noise).abs().max() < 1e-4, "other masks or noise"
    same, close = (torch.cosine_similarity(first, other, dim=0).item() for other in (second, third))
    assert same > 0.9999 and close > 0.98, f"cosines of the gradients: fp32 {same:.5f}, bf16 {close:.3f}"
    return f"equal masks; cosines of loss and gradients with the CPU's: fp32 {same:.5f}, bf16 {close:.4f}"


def epochs_of(device, folder, mode, epochs=2, batch=16):
    """(mean loss of each epoch, weights, pixels of a batch, step): taught by a full memo; the last batch is
    shorter."""
    data = random_data(2 * batch + batch // 2)
    whole = dict(dataset="cifar100", val_fraction=0.0, data_fraction=1.0)
    config = pair(device, folder, **whole, batch_size=batch, compile=mode)
    setup = bench_setup(config, alone(device), data)
    torch.manual_seed(0)
    memo = open_memo(folder / f"memo-{mode}", memo_key(setup.answers.teacher, config, data))
    fill_randomly(memo)
    setup.answers = Answers(setup.answers.teacher, setup.views, memo=memo)
    torch._dynamo.reset()
    cut = replace(config, compile="none" if mode == "graph" else mode)  # a captured step cuts views itself
    pixels = next(batches(replace(setup, config=cut), 0)).pixels.cpu()
    objective = create_objective(setup.student, setup.criterion, config.compile, setup.ranks)
    optimizer = create_optimizer(config, setup.student.model)
    progress = Meanwhile(len(data.train_labels))
    step = create_step(setup, objective, optimizer)
    losses = [train_epoch(step, epoch, progress)["train_loss"] for epoch in range(epochs)]
    return np.array(losses), [p.detach().float().cpu() for p in setup.student.parameters()], pixels, step


def check_compiled(device, folder, mode="default"):
    """Student, views, loss and sums compiled: two epochs, with a shorter last batch, end where the eager ones
    end."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    one = epochs_of(device, folder, "none")
    two = epochs_of(device, folder, mode)
    graphs, skipped = counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"]
    loss = np.abs(one[0] - two[0]).max()
    weights = max((a - b).abs().max().item() for a, b in zip(one[1], two[1], strict=True))
    assert (one[2] - two[2]).abs().max() < 1e-5, "compiled views are others"
    assert graphs == 10, f"{graphs} programs were compiled: five functions at two sizes of a batch are 10"
    assert loss < 0.02 and weights < 0.02, f"losses differ by {loss:.2g}, weights by {weights:.2g}"
    assert not counters["graph_break"], f"graph breaks: {dict(counters['graph_break'])}"
    assert device == "cpu" or not skipped, f"CUDA graphs were skipped {skipped} times"
    return f"{graphs} programs, losses differ by {loss:.1g}, weights by {weights:.1g} at most"


def check_captured(device, folder):
    """A whole step captured as one graph, for both sizes of a batch, ends where the eager ones end."""
    one, two = (epochs_of(device, folder, mode, epochs=6) for mode in ("none", "graph"))
    loss, step = np.abs(one[0] - two[0]).max(), two[3]
    weights = max((a - b).abs().max().item() for a, b in zip(one[1], two[1], strict=True))
    assert loss < 0.02 and weights < 0.02, f"losses differ by {loss:.2g}, weights by {weights:.2g}"
    if device == "cpu":
        return f"not captured on a CPU; losses differ by {loss:.1g}"
    assert isinstance(step, CapturedStep) and len(step.graphs) == 2, "a size of a batch was not captured"
    return f"{len(step.graphs)} graphs, losses differ by {loss:.1g}, weights by {weights:.1g} at most"


def check_graph(device, folder):
    """The same with the CUDA graphs of torch.compile, which are recorded for both sizes of a batch."""
    if device != "cpu":
        return check_compiled(device, folder, "reduce-overhead")
    recorded = functools.partial(torch.compile, backend="aot_eager")  # a CPU records none
    with mock.patch("torch.compile", recorded):
        return check_compiled(device, folder, "reduce-overhead")


def check_memo(device, folder):
    """A memo of a teacher on the device says what the teacher says, and is asked the second time."""
    data = random_data(64)
    config = pair(device, folder, dataset="cifar100", val_fraction=0.0, data_fraction=1.0)
    setup = bench_setup(config, alone(device), data)
    teacher = balance(setup.answers.teacher, setup.views, 64)
    views = setup.views
    plan = epoch_plan(torch.arange(64), 64, 162, seed=1, epoch=0)
    answers = Answers(teacher, views, memo=open_memo(folder, memo_key(teacher, config, data)))
    first = answers(plan)
    cost, rate = answers.take()
    again = answers(plan)
    assert rate == 0 and answers.take()[1] == 1 and first.equal(again)
    logits = teacher.logits(views(plan.image.to(device), plan.view.to(device))).cpu()
    assert logits.argmax(-1).equal(first), "the memo holds other decisions than the teacher's"
    assert len(first.unique()) > 9, "the teacher says few classes: nothing is compared"
    here = bench_setup(replace(config, device="cpu"), Ranks(), data).answers
    balance(here.teacher, here.views, 64)
    difference = (here.teacher.logits(here.views(plan.image, plan.view)) - logits).abs().max().item()
    assert difference < 0.05, f"the teacher's logits differ from the CPU's by {difference:.2g}"
    both = here(Plan(*plan)).eq(first).float().mean().item()
    return (f"64 answers in {cost:.2f} s, then none; logits differ from the CPU's by {difference:.1g}, "
            f"decisions agree {both:.0%}")


class Forked:
    """A process that is forked from this one, which saves the seconds of torch's import; used as a `Popen`
    is."""

    def __init__(self, function, env, log):
        self.returncode = None
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            os.environ.update(env)
            status = function()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self):
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def wait(self, timeout=float("inf")):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def start_ranks(config, log, world=1):
    """So many ranks of ours on the one device, which train a config."""
    file = save(config, Path(config.work_dir).parent / f"{Path(log).stem}.yaml")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = dict(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(world))
    envs = [shared | dict(RANK=str(rank)) for rank in range(world)]
    command = [sys.executable, str(Path(__file__).resolve()), str(file)]
    with open(log, "a") as out:
        if config.device == "cpu":
            return [Forked(lambda: rank_main(file), env, out) for env in envs]
        given = dict(stdout=out, stderr=out, cwd=ROOT)
        return [subprocess.Popen(command, env=os.environ | env, **given) for env in envs]


def ended(processes, seconds, log):
    """Wait for ranks to end well; an `AssertionError` with the end of their log where they don't."""
    end = time.monotonic() + seconds
    try:
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            assert time.monotonic() < end, f"not done after {seconds:.0f} s: {log_end(log)}"
            time.sleep(0.1)
        assert not any(p.poll() for p in processes), log_end(log)
    finally:
        end_all(processes)


def end_all(processes):
    """End processes that we started, at once."""
    for process in processes:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()


def log_end(log, characters=800):
    """The end of a log in a line, without what torch logs itself."""
    lines = [line.strip() for line in Path(log).read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(line for line in lines if not re.match(r"[VI]\d{4} ", line))[-characters:]


def epochs_done(config):
    """Rows of metrics that a run has."""
    return max((run.epochs_done for run in find_runs(config.runs_dir)), default=0)


def check_resume(device, folder, world=1, mode="none", deterministic=False, epochs=6, seconds=170, made=pair,
                 killed=True):
    """A run that is killed after half of its epochs and started again ends as one left alone: on a CPU to the
    byte. Not `killed`: two runs of one seed, left alone."""
    given = dict(epochs=epochs, batch_size=32, compile=mode, deterministic=deterministic)
    if world > 1 and mode != "none" and device != "cpu":  # where a compiled batch norm is refused
        given |= dict(student="vit_tiny_patch16_224", student_kwargs=TINY)
    whole, cut = (made(device, folder / name, **given) for name in ("alone", "cut"))
    logs = {name: folder / f"{name}.log" for name in ("alone", "cut")}
    for name in logs:
        (folder / name).mkdir(parents=True)
    end = time.monotonic() + seconds
    left_alone = start_ranks(whole, logs["alone"], world)
    try:
        first = start_ranks(cut, logs["cut"], world)
        try:
            while killed and epochs_done(cut) < epochs // 2:
                assert not any(p.poll() for p in first), log_end(logs["cut"])
                assert time.monotonic() < end, f"not half done in {seconds:.0f} s: {log_end(logs['cut'])}"
                time.sleep(0.02)
            if not killed:
                ended(first, end - time.monotonic(), logs["cut"])
        finally:
            end_all(first)
        before = epochs_done(cut)
        if killed:
            assert before < epochs, "it was done before it was killed"
            ended(start_ranks(cut, logs["cut"], world), end - time.monotonic(), logs["cut"])
        ended(left_alone, end - time.monotonic(), logs["alone"])
    finally:
        end_all(left_alone)
    one, two = (find_runs(config.runs_dir)[0] for config in (whole, cut))
    rows = [run.metrics().drop(columns=TIMED) for run in (one, two)]
    states = [safetensors.torch.load_file(run.model / "model.safetensors") for run in (one, two)]
    assert not killed or "resumes after epoch" in logs["cut"].read_text()
    assert len(rows[0]) == len(rows[1]) == epochs
    loss = (rows[0].train_loss - rows[1].train_loss).abs().max()
    first, second = states
    weights = max((first[name].float() - second[name].float()).abs().max().item() for name in first)
    same = weights == 0 and rows[0].equals(rows[1])
    exact = deterministic or device == "cpu"
    assert same or not exact, f"weights differ by {weights:.2g}, losses by {loss:.2g}"
    assert loss < 0.2, f"losses differ by {loss:.2g}"
    how = "the same to the byte" if same else f"weights differ by {weights:.1g}, losses by {loss:.1g} at most"
    what = f"killed after {before} of {epochs} epochs" if killed else "not killed"
    return f"{what}: {how}; top-1 {one.metrics().test_top1.iloc[-1]:.1%} on test"


def check_two_processes(device, folder, mode="none", deterministic=False):
    """Two processes on the one device, by gloo; killed and resumed."""
    return check_resume(device, folder, world=2, mode=mode, deterministic=deterministic)


def check_recipe(device, folder, seconds=170):
    """All of a recipe, killed and resumed, compiled on a GPU."""
    told = check_resume(device, folder, mode="auto", seconds=seconds, made=recipe)
    run, = find_runs(folder / "cut/runs")
    average = run.metrics().ema_test_top1
    assert average.notna().all(), f"top-1 of the weight average: {average.tolist()}"
    return f"{told}, of the weight average {average.iloc[-1]:.1%}"


def check_ranks_agree(device, folder, epochs=2, seconds=170):
    """Two processes on the one device have the losses of one."""
    one, two = (pair(device, folder / str(world), epochs=epochs, data_fraction=0.2) for world in (1, 2))
    for world in (1, 2):
        (folder / str(world)).mkdir(parents=True)
    started = [start_ranks(config, folder / f"{world}.log", world) for world, config in ((1, one), (2, two))]
    try:
        for world, processes in zip((1, 2), started):
            ended(processes, seconds, folder / f"{world}.log")
    finally:
        end_all(sum(started, []))
    losses = [find_runs(config.runs_dir)[0].metrics().train_loss for config in (one, two)]
    difference = (losses[0] - losses[1]).abs().max()
    assert difference < (1e-4 if device == "cpu" else 0.02), f"losses differ by {difference:.2g}"
    return f"losses of {epochs} epochs differ by {difference:.1g} at most"


CHECKS = {"views equal the CPU's": check_views, "losses equal the CPU's": check_losses,
          "LITv2 equals the CPU's": check_litv2, "pre-training equals the CPU's": check_pretraining,
          "compiled equals eager": check_compiled, "CUDA graphs, with the last batch": check_graph,
          "captured equals eager": check_captured,
          "a memo on the device": check_memo,
          "a killed run resumes": check_resume, "all of a recipe, killed and resumed": check_recipe,
          "two processes have one's losses": check_ranks_agree,
          "two processes, killed and resumed": check_two_processes}


def look(name, device="cuda"):
    """A check by its name, in a folder of its own: for those cells of the notebooks that need a GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA GPU here: not checked"
    with tempfile.TemporaryDirectory() as folder:
        return CHECKS[name](device, Path(folder))


def by_gloo(device):
    """In place of `start_ranks`: all ranks on the first GPU, or on the CPU."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    check_device(device)
    if device == "cuda":
        device = "cuda:0"
        torch.cuda.set_device(0)
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    return Ranks(rank, world, world, device)


def rank_main(file):
    """One rank: `vitdistill.train`; returns the exit status."""
    train.start_ranks = by_gloo
    return train.main(["--config", str(file)])


if __name__ == "__main__":
    sys.exit(rank_main(sys.argv[1]))
