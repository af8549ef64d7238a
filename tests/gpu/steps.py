"""The steps of `make gpu`: `python tests/gpu/steps.py STEP --work DIR --device cuda --seconds N` does one of them and
writes what it finds, as it finds it, to DIR/found.jsonl. `--toy` does the same at a size for the CPU."""
import argparse
import functools
import json
import operator
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import checks  # first: it finds the package
import timm
import torch
from checks import TINY, pair

from vitdistill import bench, contenders
from vitdistill.config import preset
from vitdistill.data import load_data
from vitdistill.outcome import predictions_at
from vitdistill.runs import find_runs
from vitdistill.setup import resolve
from vitdistill.teachers import Teacher, adopt
from vitdistill.views import Views, epoch_plan

MARKS = {"recompiles": "Recompiling function", "graph breaks": "Graph break", "graphs skipped": "skipping cudagraphs"}
SENSES = {"<=": operator.le, ">=": operator.ge, "=": operator.eq}
WINDOW = 30.0  # seconds over which the study counts its images


class Job:
    """What a step is given: a device, a folder of its own, the data, a size, and time."""

    def __init__(self, step, work, device, toy, seconds, data):
        self.step, self.base, self.device, self.toy, self.data = step, Path(work), device, toy, data
        self.end, self.failed = time.monotonic() + seconds, []
        self.compile, self.ranks = "reduce-overhead" if device == "cuda" else "none", checks.alone(device)
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


def said_of_compiling(text):
    """What a log says of compiled programs that were made again, cut in two, or run without graphs."""
    return ", ".join(f"{what} {text.count(mark)}" for what, mark in MARKS.items())


def step_digits(job):
    """The whole path on the digits, one process for each way of compiling, side by side."""
    epochs, modes = 2 if job.toy else 4, ("none", "default", "reduce-overhead")
    for mode in modes:
        (job.work / mode).mkdir()
    given = dict(epochs=epochs, precision="auto", teacher_precision="auto")
    configs = {mode: pair(job.device, job.work / mode, compile=mode, **given) for mode in modes}
    running = {mode: job.train(config, mode) for mode, config in configs.items()}
    top1 = {}
    for mode, process in running.items():
        def trained():
            log = job.work / f"{mode}.log"
            checks.ended([process], max(1, job.left() - 3), log)
            run = find_runs(configs[mode].runs_dir)[0]
            metrics = run.metrics()
            top1[mode] = run.result["test_top1"] if "test_top1" in run.result else metrics.test_top1.iloc[-1]
            seconds, hits = (", ".join(map(form.format, metrics[name]))
                             for form, name in (("{:.2f}", "seconds"), ("{:.0%}", "memo_hit_rate")))
            return (f"test top-1 {top1[mode]:.1%} after {epochs} epochs; seconds an epoch {seconds}; memo hits {hits}; "
                    + said_of_compiling(log.read_text()))
        job.attempt(f"digits, compile {mode}", trained)
    if len(top1) > 1:
        spread = 100 * (max(top1.values()) - min(top1.values()))
        job.found("digits: highest - lowest test top-1 of the three", round(spread, 2), "points", "<= 5")


def step_ranks(job):
    """Two processes on the one device by gloo, killed and resumed, and one alike; with and without determinism. One
    that trains by all of a recipe."""
    cases = {f"two ranks, compile {mode}": dict(world=2, mode=mode) for mode in ("none", "default")}
    cases["one process"] = {}
    if checks.can_be_deterministic() and not job.toy:
        cases |= {f"{name}, deterministic": given | dict(deterministic=True) for name, given in cases.items()}
    with ThreadPoolExecutor(1 if job.toy else 3) as pool:
        def start(folder, check, **given):
            (job.work / folder).mkdir()
            return pool.submit(check, job.device, job.work / folder, seconds=max(1, job.left() - 5), **given)
        waiting = {"two ranks have one's losses": start("agree", checks.check_ranks_agree),
                   "one process, all of a recipe": start("recipe", checks.check_recipe)}
        waiting |= {name: start(str(number), checks.check_resume, **given)
                    for number, (name, given) in enumerate(cases.items())}
        for name, future in waiting.items():
            job.attempt(name, future.result)


def turns(job, build, config, data, steps, times=3):
    """(seconds of each of some warm turns of a contender, what makes its turns)."""
    watch = contenders.Watch(job.device)
    ready = build(config, job.ranks, data, watch)
    for _ in range(2):  # compiles, records, fills the memo; then warm
        contenders.clock(watch, ready(min(steps, 20)))
    return [contenders.clock(watch, ready(steps)) for _ in range(times)], ready


def launches(job, turn, steps, wall):
    """Milliseconds a step that the device was busy, and how often the host gave it work."""
    with torch.profiler.profile() as found:
        contenders.clock(contenders.Watch(job.device), turn)
    events = found.key_averages()
    busy = sum(bench.milliseconds(events, "cuda").values()) / steps  # of kernels
    marks = "LaunchKernel", "GraphLaunch", "MemcpyAsync", "MemsetAsync"
    calls = {mark: sum(e.count for e in events if mark in e.key and e.key.startswith("cu")) / steps for mark in marks}
    told = ", ".join(f"{name} {count:.1f}" for name, count in calls.items())
    return (f"busy for {busy:.3f} ms of a step's {1000 * wall:.3f} (near all: the device sets the pace, else the "
            f"host); calls a step: {told}")


def step_pace(job):
    """The bare step, the plain epoch, the full memo, with both stems; then with cudnn.benchmark; where time goes."""
    small = dict(student="resnet18", teacher="vit_tiny_patch16_224", teacher_kwargs=TINY, teacher_size=32, batch_size=2)
    taught = contenders.bench_config(job.device, compile=job.compile, **(small if job.toy else {}))
    data, steps = contenders.random_data(16 if job.toy else 50_000), 1 if job.toy else 390
    plain, goals = replace(taught, distillation="none", teacher=""), dict(imagenet="<= 0.6", cifar="<= 4.5")
    known = {"bare": (contenders.bare, plain), "plain": (contenders.vitdistill, plain),
             "full memo": (functools.partial(contenders.vitdistill, full=True), taught)}
    for stem, benchmark in (("imagenet", False), ("cifar", False), ("imagenet", True), ("cifar", True)):
        torch.backends.cudnn.benchmark = benchmark
        name = f"{'timm' if stem == 'imagenet' else stem} stem, cudnn.benchmark {'on' if benchmark else 'off'}"
        seconds = {}
        for who in ("bare", "plain") if benchmark else known:
            def measured():
                torch._dynamo.reset()
                build, config = known[who]
                times, ready = turns(job, build, replace(config, stem=stem), data, steps)
                seconds[who], few = sorted(times)[1], min(steps, 20)
                if who == "plain" and not benchmark:
                    job.attempt(f"{name}: the device", lambda: launches(job, ready(few), few, seconds[who] / steps))
                return ", ".join(f"{t:.3f}" for t in times) + " s"
            job.attempt(f"{name}: {steps} steps, {who}, three turns", measured)
        if "plain" in seconds:
            job.found(f"{name}: plain epoch", round(seconds["plain"] * 390 / steps, 3), "s", goals[stem])
        if {"bare", "plain"} <= set(seconds):
            share = seconds["bare"] / seconds["plain"]
            job.found(f"{name}: plain, of the bare step", round(share, 3), "", ">= 0.97")
        if {"full memo", "plain"} <= set(seconds):
            share = seconds["full memo"] / seconds["plain"]
            job.found(f"{name}: seconds with a full memo / plain", round(share, 3), "", "<= 1.03")
    torch.backends.cudnn.benchmark = False
    job.attempt("the bench's profile", lambda: profiled(job, taught, data))


def profiled(job, config, data):
    """The bench's profile, as a file, and the operations in which the plain epoch differs most from the bare step."""
    torch._dynamo.reset()
    frame = bench.profile(config, images=len(data.train_labels), steps=2 if job.toy else 8)
    frame.to_csv(job.work / "profile.csv", index=False)
    print(frame.to_string(), flush=True)
    most = "; ".join(f"{row.iloc[0][:60]} {row.more:+.3f}" for _, row in frame.iloc[1:6].iterrows())
    return f"plain less bare, ms a step: {most}"


def rate(job, call, images, seconds=1.0):
    """Images a second of a call, warm."""
    watch = contenders.Watch(job.device)
    for _ in range(2):
        contenders.clock(watch, call)
    calls = spent = 0
    while spent < seconds:
        spent, calls = spent + contenders.clock(watch, call), calls + 1
    return calls * images / spent


def step_peak(job):
    """A matrix product, the teacher alone by precision and chunk, and a step of DeiT-B, beside the product."""
    least = 0.1 if job.toy else 1.0
    small = dict(teacher="vit_tiny_patch16_224", teacher_kwargs=TINY, teacher_size=32, batch_size=8)
    config = contenders.bench_config(job.device, compile=job.compile, **(small if job.toy else dict(batch_size=256)))
    watch, data = contenders.Watch(job.device), contenders.random_data(64 if job.toy else 4096)
    product = contenders.matmul(config, job.ranks, data, watch)
    peak = rate(job, product(1 if job.toy else 10), (1 if job.toy else 10) * watch.flop_per_step, least)
    job.found(f"matrix product, {config.teacher_precision}", round(peak / 1e12, 3), "TFLOP/s")
    heavy = replace(config, distillation="none", teacher="", student=config.teacher, optimizer="adamw", lr=1e-4,
                    student_kwargs=config.teacher_kwargs, student_size=config.teacher_size)
    for mode in dict.fromkeys(("none", heavy.compile)):
        def step():
            torch._dynamo.reset()
            ready = contenders.bare(replace(heavy, compile=mode), job.ranks, data, contenders.Watch(job.device))
            model = contenders.create(heavy.student, 100, heavy.student_size, **heavy.student_kwargs)
            images = rate(job, ready(1 if job.toy else 5), heavy.batch_size * (1 if job.toy else 5), least)
            share = images * 3 * contenders.flops(model, heavy.student_size) / peak
            name = f"bare {heavy.student} at {heavy.student_size} px, compile {mode}: of the product"
            job.found(name, round(share, 3), "", ">= 0.45")
            return f"{images:,.0f} images/s in batches of {heavy.batch_size}"
        job.attempt(f"bare {heavy.student}, compile {mode}", step)
    teachers(job, config, data, peak, least)
    job.attempt("hard labels under autocast and in pure bf16", lambda: agreement(job))


def alone(model, constants, size, how, device, chunk, compile=False):
    """A teacher in fp32, under autocast, or with its weights in bf16."""
    teacher = Teacher(model, constants, size, "bf16" if how == "autocast" else "fp32", device, chunk, compile)
    if how == "pure bf16":
        teacher.model.bfloat16()
        forward = teacher.forward
        teacher.forward = lambda x: forward(x.bfloat16())
    return teacher


def teachers(job, config, data, peak, least):
    """Images a second of the bench's teacher, by precision, chunk and compiling."""
    def model():
        return contenders.create(config.teacher, 100, config.teacher_size, **config.teacher_kwargs)
    work = contenders.flops(model(), config.teacher_size)
    chunks, views = ((8, 16) if job.toy else (256, 512, 1024)), Views(data.train_images, 4, job.device)
    cases = [(how, chunk, False) for how in ("autocast", "pure bf16") for chunk in chunks]
    cases.append(("fp32", chunks[-1], False))
    if not job.toy:
        cases += [("autocast", 512, True), ("pure bf16", 512, True)]
    for how, chunk, compile in cases:
        def asked():
            torch._dynamo.reset()
            teacher = alone(model(), data.mean_std, config.teacher_size, how, job.device, chunk, compile)
            rows = torch.arange(2 * chunk, device=views.device) % len(data.train_labels)
            images = rate(job, lambda: teacher.logits(views(rows)), len(rows), least)
            return f"{images:,.0f} images/s, {images * work / peak:.1%} of the product"
        job.attempt(f"{config.teacher} alone, {how}, chunks of {chunk}{', compiled' * compile}", asked)


def agreement(job):
    """Hard labels of a real ViT-Tiny on 10,000 views of real images, where they are here, in three precisions."""
    weights = job.data and Path(job.data) / "weights/vit_tiny_patch16_224.cifar100.safetensors"
    real = not job.toy and weights and weights.is_file()
    config = preset("small", "teacher", data_root=str(job.data)) if real else pair(job.device, job.work)
    data = load_data(config) if real else contenders.random_data(64)
    size, kwargs = (224, {}) if real else (32, TINY)
    n, states = (10_000 if real else 32), {}
    plan = epoch_plan(torch.arange(n), len(data.train_labels), 162, seed=1, epoch=0)
    views = Views(data.train_images, 4, job.device)
    for how in ("fp32", "autocast", "pure bf16"):
        torch.manual_seed(0)
        model = contenders.create("vit_tiny_patch16_224", 100, size, **kwargs)
        if real:
            timm.models.load_checkpoint(model, str(weights))
        teacher = alone(model, data.mean_std, size, how, job.device, min(n, 512))
        states[how] = torch.cat([teacher.logits(views(*(t.to(views.device) for t in part))).argmax(-1).cpu()
                                 for part in zip(plan.image.split(2048), plan.view.split(2048))])
    same = {how: states[how].eq(states["fp32"]).float().mean().item() for how in states}
    kind = "of a fine-tuned ViT-Tiny" if real else "of random weights on noise: says nothing of accuracy"
    return f"on {n:,} views {same['autocast']:.2%} and {same['pure bf16']:.2%} are those of fp32 ({kind})"


def adopted(job, name, file, new_head):
    """The folder of a teacher whose weights were trained elsewhere."""
    if job.toy:
        config = pair(job.device, job.work, distillation="none", teacher="", teacher_kwargs={}, student_size=32,
                      student="vit_tiny_patch16_224", student_kwargs=TINY, data_fraction=0.2)
    else:
        config = preset("small", "teacher", data_root=str(job.data), padding=4, student_size=224, device=job.device,
                        work_dir=str(job.work / "work"))
    config, folder = resolve(config), job.work / "teachers" / name / "model"
    card = adopt(config, file, folder, load_data(config), config.device, config.precision, new_head)
    job.found(f"teacher {name}: top-1 on images that it held out", round(100 * card["top1_held_out"], 1), "%")
    return str(folder)


def toy_weights(job):
    """Weights of a tiny teacher that nobody trained."""
    from safetensors.torch import save_file
    file = job.work / "toy.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY).state_dict(), file)
    return file


def arms(job):
    """Name -> config of the long run's arms, seed 1."""
    places = dict(runs_dir=str(job.work / "runs"), work_dir=str(job.work / "work"), device=job.device)
    if job.toy:
        weights = {"teacher": toy_weights(job), "untrained head": toy_weights(job)}
        taught = pair(job.device, job.work, epochs=200, experiment="distilled", batch_size=32)
        plain = replace(taught, distillation="none", teacher="", teacher_kwargs={}, experiment="baseline")
    else:
        folder = Path(job.data or "nowhere") / "weights"
        weights = {"teacher": folder / "vit_tiny_patch16_224.cifar100.safetensors",
                   "untrained head": folder / "vit_tiny_patch16_224.in21k_in1k_tinyimagenet200.safetensors"}
        places |= dict(data_root=str(job.data), epochs=2000, t_max=2000, nproc=1, precision="bf16",
                       keep_checkpoints=[25, 50, 100, 150, 400, 1000])
        plain, kwargs = preset("paper", "baseline", **places), dict(img_size=224, dynamic_img_size=True)
        taught = preset("paper", "distilled", teacher="vit_tiny_patch16_224", teacher_kwargs=kwargs, **places)
    found = {"plain": plain}
    for name, file in weights.items():
        def made():
            folder = adopted(job, name.replace(" ", "-"), file, name != "teacher")
            untrained = job.toy or name != "teacher"
            found[f"taught, {name}"] = replace(taught, teacher_weights=folder, allow_untrained=untrained)
            return folder
        job.attempt(f"teacher {name} adopted", made)
    return found


def seeds_of(job, known):
    """(name, config, epochs at which it makes room) in the order in which they are wanted."""
    target = 1 if job.toy else 150
    def seed(s):
        return [(f"{name}, seed {s}", replace(config, seed=s), target) for name, config in known.items()]
    if job.toy:
        return seed(1)
    first = {name: config for name, config in known.items() if "untrained" not in name}
    short = dict(epochs=60, t_max=0, keep_checkpoints=[])
    annealed = [(f"{name}, annealed over 60, seed {s}", replace(config, seed=s, **short), 60)
                for s in (1, 2, 3) for name, config in first.items()]
    cifar = [(f"{name}, CIFAR stem", replace(config, stem="cifar"), 20) for name, config in first.items()]
    return [*seed(1), *seed(2), *seed(3), *annealed, *cifar]


def run_of(config):
    """The run folder of a config that may not be resolved here; None where it isn't begun."""
    same = "seed", "stem", "epochs", "t_max", "teacher_weights"
    fits = lambda run: all(getattr(run.config, name) == getattr(config, name) for name in same)
    return next(filter(fits, find_runs(config.runs_dir)), None)


def epochs_of(config):
    run = run_of(config)
    return run.epochs_done if run else 0


def makes_room(config, target):
    """Has a run come as far as is wanted? A whole one ends by itself, some time after its last epoch."""
    return target < config.epochs and epochs_of(config) >= target


def file_name(name):
    """A run's name as a file's."""
    return name.replace(", ", "-").replace(" ", "-")


def step_study(job):
    """The long run's three arms, then other seeds, as many side by side as make the images a second of all rise."""
    queue, running, width = seeds_of(job, arms(job)), {}, 3
    tick, before, last = time.monotonic(), 0, 0.0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("cut"))
    begun, done = {}, {}  # epochs that an earlier call left, and those of this one
    try:
        while (queue or running) and job.left() > 15:
            while queue and len(running) < width:
                name, config, target = queue.pop(0)
                if makes_room(config, target) or (run := run_of(config)) and run.status == "done":
                    continue
                begun[name], done[name] = epochs_of(config), 0
                running[name] = job.train(config, file_name(name)), config, target
            time.sleep(0.2 if job.toy else 1.0)
            for name, (process, config, target) in list(running.items()):
                done[name] = epochs_of(config) - begun[name]
                if makes_room(config, target) or process.poll() is not None:
                    close(job, name, *running.pop(name)[:2])
                    keep_decisions(job, name, config)
            now = time.monotonic()
            if any(done[name] < 2 for name in running):  # it compiles
                tick, before = now, sum(done.values())
            if now - tick > WINDOW:
                images = (sum(done.values()) - before) * 50_000 / (now - tick)
                job.found(f"images/s of {len(running)} runs side by side", round(images))
                width += (images > 1.1 * last) and width < 8
                tick, before, last = now, sum(done.values()), images
    finally:
        for process, *_ in running.values():
            process.send_signal(signal.SIGTERM)  # it has its last checkpoint
        for name, (process, config, _) in running.items():
            close(job, name, process, config)
        for name, (_, config, _) in running.items():  # last: it may be cut
            keep_decisions(job, name, config)


def close(job, name, process, config):
    """End a run that makes room, and note how far it came; one that failed fails the step."""
    failed = process.poll() not in (None, 0, -signal.SIGTERM)
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    run = run_of(config)
    def far():
        log = checks.log_end(job.work / f"{file_name(name)}.log")
        assert run and run.epochs_done and not failed, f"status {process.returncode}: {log}"
        metrics = run.metrics()
        memo, middle = metrics.memo_hit_rate.iloc[-1], metrics.median(numeric_only=True)
        return (f"{len(metrics)} epochs, test top-1 {metrics.test_top1.iloc[-1]:.1%}; {middle.seconds:.2f} s an epoch "
                f"(median, beside others), {middle.images_per_second:,.0f} images/s"
                + (f", memo hits {memo:.0%}" if memo == memo else ""))
    job.attempt(name, far)


def keep_decisions(job, name, config):
    """What the last checkpoint of a run that makes room decides on each test image, for intervals over images."""
    run = run_of(config)
    if run and run.status != "done" and (run.work / "checkpoint.pt").is_file():
        job.attempt(f"{name}, decisions of its last checkpoint", lambda: predictions_at(run).name)


STEPS = {name.removeprefix("step_"): step for name, step in list(globals().items()) if name.startswith("step_")}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--work", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--data", default="")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.toy else 4)
    job = Job(args.step, args.work, args.device, args.toy, args.seconds, args.data)
    STEPS[args.step](job)
    if job.failed:
        sys.exit(f"{args.step}: failed: {'; '.join(job.failed)}")


if __name__ == "__main__":
    main()
