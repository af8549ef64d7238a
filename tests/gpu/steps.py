"""The steps of `make gpu`: `python tests/gpu/steps.py STEP --work DIR --device cuda --seconds N` does one of
them and writes what it finds, as it finds it, to DIR/found.jsonl. `--toy` does the same at a size for the
CPU."""
import argparse
import functools
import json
import math
import operator
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import checks  # first: it finds the package
import timm
import torch
from checks import TINY, pair
from torch.utils.benchmark import timer

from vitdistill.bench import contenders
from vitdistill.config import preset
from vitdistill.data.datasets import load_data
from vitdistill.train.outcome import predictions_at
from vitdistill.runs import find_runs
from vitdistill.train.setup import resolve
from vitdistill.teachers.teacher import adopt

SENSES = {"<=": operator.le, ">=": operator.ge, "=": operator.eq}
ENDED = 0, -signal.SIGTERM, 128 + signal.SIGTERM  # exit statuses of a run that ended by itself or when asked
DECIDED = 10  # epochs between two decisions about the test images that the study keeps
WEIGHTS = "weights/vit_tiny_patch16_224.cifar100.safetensors"


class Job:
    """What a step is given: a device, a folder of its own, the data, a size, and time."""

    def __init__(self, step, work, device, toy, seconds, data="", seed=1, annealed=False):
        self.step = step
        self.base = Path(work)
        self.device = device
        self.toy = toy
        self.data = data
        self.seed, self.annealed = seed, annealed
        self.end, self.failed = time.monotonic() + seconds, []
        self.ranks = checks.alone(device)
        self.work = self.base / step
        self.work.mkdir(parents=True, exist_ok=True)  # the study goes on in what an earlier call left

    def left(self):
        return self.end - time.monotonic()

    def found(self, what, value, unit="", goal=""):
        """Note a finding: a number or a sentence, beside its goal, such as '<= 0.6'."""
        met, goal = "", "" if self.toy else goal
        if goal and isinstance(value, (int, float)):
            sense, number = goal.split()
            met = "yes" if SENSES[sense](value, float(number)) else "no"
        row = dict(step=self.step, what=what, value=value, unit=unit, goal=goal, met=met)
        with open(self.base / "found.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{what}: {value} {unit} {goal and f'({goal}: {met})'}", flush=True)

    def attempt(self, what, function):
        """What a function says, as a finding; an error is one too, and fails the step at its end."""
        try:
            self.found(what, function())
        except Exception as e:  # the other findings go on
            self.failed.append(what)
            self.found(what, f"FAILED: {type(e).__name__}: {str(e).strip()[-600:]}")
            if not isinstance(e, AssertionError):
                traceback.print_exc()

    def train(self, config, log):
        """Start one process that trains a config."""
        return checks.start_ranks(config, self.work / f"{log}.log")[0]


def step_checks(job):
    """Every check that takes no process of its own; `ranks` does the others."""
    here = [name for name in checks.CHECKS if "process" not in name and "killed" not in name]
    for i, name in enumerate(here):
        folder = job.work / str(i)
        folder.mkdir()
        job.attempt(name, functools.partial(checks.CHECKS[name], job.device, folder))


def step_ranks(job):
    """Two processes on the one device by gloo, killed and resumed, and one alike, first those that must be
    the same to the byte. The same seed twice without a kill says whether rounding alone makes the others
    differ. Then a recipe."""
    exact, plain = dict(deterministic=True), dict(world=2)
    cases = {}
    if not job.toy:
        cases = {"one process, deterministic": exact, "two ranks, deterministic": plain | exact,
                 "one process, captured, deterministic": exact | dict(mode="graph"),
                 "one process, the same twice, not killed": dict(killed=False)}
    cases |= {"one process": {}, "two ranks": plain}
    cases |= {"two ranks, compile default": plain | dict(mode="default")}
    with ThreadPoolExecutor(1 if job.toy else 4) as pool:
        def start(folder, check, **given):
            (job.work / folder).mkdir()
            return pool.submit(check, job.device, job.work / folder, seconds=max(1, job.left() - 5), **given)
        waiting = {name: start(str(number), checks.check_resume, **given)
                   for number, (name, given) in enumerate(cases.items())}
        waiting |= {"two ranks have one's losses": start("agree", checks.check_ranks_agree),
                    "one process, all of a recipe": start("recipe", checks.check_recipe)}
        names = {future: name for name, future in waiting.items()}
        for future in as_completed(names):  # each is kept as it ends: the step may be cut
            job.attempt(names[future], future.result)


PATCHES = dict(img_size=32, patch_size=4)
STUDENTS = {"timm's stem": ({}, "<= 0.6"), "CIFAR stem": (dict(stem="cifar"), "<= 4.5"),  # goals: s an epoch
            "ViT-Tiny": (dict(student="vit_tiny_patch16_224", student_kwargs=PATCHES), "")}


def bench_of(job, name, mode):
    """(config, data, steps of an epoch) of a student alone: a ResNet-50 unless it names another."""
    small = dict(student="resnet18", batch_size=2) if job.toy else {}
    config = contenders.bench_config(job.device, compile=mode, **small | STUDENTS[name][0])
    data = contenders.random_data(16 if job.toy else 50_000)
    return replace(config, distillation="none", teacher=""), data, 8 if job.toy else 390


def timed(job, name, mode, times=3, start=""):
    """Note seconds of the first epoch of a student, which compiles or captures, and of warm ones; returns
    (its contender, seconds of a step)."""
    torch._dynamo.reset()
    config, data, steps = bench_of(job, name, mode)
    begun = timer()
    turn = contenders.vitdistill(config, job.ranks, data)
    turn(steps)()
    first, seconds = timer() - begun, []
    for _ in range(times):
        run, begun = turn(steps), timer()
        run()
        seconds.append(timer() - begun)
    warm = sorted(seconds)[times // 2]
    what = f"{name}, compile {mode}{start}"
    job.found(f"{what}: first epoch", round(first, 2), "s")
    job.found(f"{what}: an epoch", round(warm, 3), "s", STUDENTS[name][1])
    return turn, warm / steps


def kernels(job, turn, seconds, steps=20):
    """Milliseconds a step that the device was busy, how often the host gave it work, and its ten largest
    kernels."""
    run, on_gpu = turn(steps), torch.autograd.DeviceType.CUDA
    with torch.profiler.profile() as seen:
        run()
    events = seen.key_averages()
    if job.device == "cuda":  # of kernels alone, since operators repeat their time
        of = {e.key: e.self_device_time_total / 1000 / steps for e in events
              if e.device_type == on_gpu and not e.is_user_annotation}
    else:
        of = {e.key: e.self_cpu_time_total / 1000 / steps for e in events}
    marks = "LaunchKernel", "GraphLaunch", "MemcpyAsync", "MemsetAsync"
    own = [e for e in events if e.key.startswith("cu")]
    calls = {mark: sum(e.count for e in own if mark in e.key) / steps for mark in marks}
    largest = sorted(of.items(), key=lambda item: -item[1])[:10]
    rates = ", ".join(f"{name} {count:.1f}" for name, count in calls.items())
    kernels = "; ".join(f"{name[:70]} {ms:.3f}" for name, ms in largest)
    return (f"busy for {sum(of.values()):.3f} ms of a step's {1000 * seconds:.3f}; calls a step: {rates}; "
            f"ms a step of the largest kernels: {kernels}")


def step_profile(job):
    """Where the time of a step goes, with both stems, captured as one graph and as it comes."""
    for mode, times in (("graph", 3), ("none", 1)):
        for name in ("timm's stem", "CIFAR stem"):
            def profiled():
                turn, seconds = timed(job, name, mode, times)
                return kernels(job, turn, seconds, 8 if job.toy else 20)
            job.attempt(f"{name}, compile {mode}", profiled)


def step_modes(job):
    """Seconds of the first epoch, and of a warm one, as torch.compile makes the step. `profile` has the
    others'. A second start finds the first's programs on disk. A ViT's `default` compiles its blocks, the
    other modes all of it. On a CPU: `python tests/gpu/steps.py modes --work DIR --toy --device cpu`."""
    for mode, start in (("reduce-overhead", ""), ("reduce-overhead", ", second start"), ("default", "")):
        for name in STUDENTS:
            try:
                timed(job, name, mode, 1 if job.toy else 3, start)
            except Exception as e:  # the other modes go on
                job.failed.append(mode)
                job.found(f"{name}, compile {mode}{start}", f"FAILED: {type(e).__name__}: {str(e)[-600:]}")


def adopted(job, weights):
    """The folder of a teacher whose weights were trained elsewhere."""
    if job.toy:
        config = pair(job.device, job.work, distillation="none", teacher="", teacher_kwargs={},
                      student_size=32, student="vit_tiny_patch16_224", student_kwargs=TINY, data_fraction=0.2)
    else:
        config = preset("small", "teacher", data_root=str(job.data), padding=4, student_size=224,
                        device=job.device, work_dir=str(job.work / "work"))
    config, folder = resolve(config), job.work / "teacher/model"
    card = adopt(config, weights, folder, load_data(config), config.device, config.precision)
    return str(folder), f"top-1 {card.top1_held_out:.1%} on images that it held out"


def toy_weights(job):
    """Weights of a tiny teacher that nobody trained."""
    from safetensors.torch import save_file
    file = job.work / "toy.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY).state_dict(), file)
    return file


def wait_for_data(job):
    """Wait until CIFAR-100 and the teacher's weights are there: they may come in parts."""
    names = "cifar-100-python/train", "cifar-100-python/test", WEIGHTS
    wanted = [Path(job.data or "nowhere") / name for name in names]
    while missing := [str(file) for file in wanted if not file.is_file()]:
        if job.left() < 15:
            raise FileNotFoundError(f"{missing[0]} has not come: give --data a folder with CIFAR-100 and the "
                                    "weights")
        time.sleep(1)
    return wanted[2]


def pair_of(job):
    """Name -> config of the paper's pair with the CIFAR stem: labels alone, and taught."""
    places = dict(runs_dir=str(job.work / "runs"), work_dir=str(job.work / "work"))
    places |= dict(device=job.device, seed=job.seed)
    if job.toy:
        weights = toy_weights(job)
        taught = pair(job.device, job.work, epochs=2, experiment="distilled", batch_size=32)
        taught = replace(taught, keep_checkpoints=[1], allow_untrained=True)
        plain = replace(taught, distillation="none", teacher="", teacher_kwargs={}, experiment="baseline")
    else:
        weights, length = wait_for_data(job), 60 if job.annealed else 2000
        places |= dict(data_root=str(job.data), epochs=length, t_max=length, nproc=1, precision="bf16",
                       stem="cifar", compile="graph", keep_checkpoints=list(range(DECIDED, length, DECIDED)))
        plain = preset("paper", "baseline", **places)
        kwargs = dict(img_size=224, dynamic_img_size=True)
        taught = preset("paper", "distilled", teacher="vit_tiny_patch16_224", teacher_kwargs=kwargs, **places)
    folder, said = adopted(job, weights)
    job.found("the teacher", said)
    return {"plain": plain, "taught": replace(taught, teacher_weights=folder)}


def run_of(config):
    """The run folder of a config that may not be resolved here; None where it isn't begun."""
    same = "seed", "stem", "epochs", "t_max", "teacher_weights"
    for run in find_runs(config.runs_dir):
        if all(getattr(run.config, name) == getattr(config, name) for name in same):
            return run
    return None


def step_study(job):
    """The pair side by side until its time is over. Decisions about the test images are kept every ten
    epochs."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("cut"))
    running = {}
    try:
        for name, config in pair_of(job).items():
            if not (run := run_of(config)) or run.status != "done":
                running[name] = job.train(config, name), config
        while job.left() > 15 and any(process.poll() is None for process, _ in running.values()):
            time.sleep(0.2 if job.toy else 1.0)
            for name, (_, config) in running.items():
                keep_decisions(job, name, config)
    finally:
        for process, _ in running.values():  # first all, since each waits for its last checkpoint
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for name, (process, config) in running.items():
            close(job, name, process, config)
        for name, (_, config) in running.items():  # last: it may be cut
            keep_decisions(job, name, config)


def close(job, name, process, config):
    """End a run, and note how far it came; one that failed fails the step."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(5)
    except Exception:  # it hangs
        process.kill()
        process.wait()
    run = run_of(config)
    def far():
        log = checks.log_end(job.work / f"{name}.log")
        assert run and run.epochs_done and process.returncode in ENDED, f"status {process.returncode}: {log}"
        metrics = run.metrics()
        middle = metrics.median(numeric_only=True)
        memo = metrics.memo_hit_rate.iloc[-1]
        hits = "" if math.isnan(memo) else f", memo hits {memo:.0%}"
        first = metrics.seconds.iloc[0]
        return (f"{len(metrics)} epochs, test top-1 {metrics.test_top1.iloc[-1]:.1%}; first epoch "
                f"{first:.1f} s, then {middle.seconds:.2f} s an epoch (median, side by side)"
                f", {middle.images_per_second:,.0f} images/s{hits}")
    job.attempt(name, far)


def keep_decisions(job, name, config):
    """What each kept checkpoint of a run decides on each test image, for intervals over images."""
    if not (run := run_of(config)):
        return
    for epochs in config.keep_checkpoints or ():
        there = run.epochs_done > epochs or run.status == "done"  # so that its file is whole
        if there and not (run.folder / f"predictions-{epochs:04d}.npz").is_file():
            job.attempt(f"{name}, decisions at {epochs}", lambda: predictions_at(run, epochs).name)


STEPS = dict(checks=step_checks, ranks=step_ranks, profile=step_profile, modes=step_modes, study=step_study)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--work", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--data", default="")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--annealed", action="store_true")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.toy else 4)
    job = Job(args.step, args.work, args.device, args.toy, args.seconds, args.data, args.seed, args.annealed)
    STEPS[args.step](job)
    if job.failed:
        sys.exit(f"{args.step}: failed: {'; '.join(job.failed)}")


if __name__ == "__main__":
    main()
