"""Eleven minutes on a GPU, in one command: `make gpu`, or `python tests/gpu/run.py`.

It needs this checkout and a Python with torch, timm, pandas and pytest. It runs each step in a process of its
own, cuts it where its time is over, goes on after one that fails, and writes one folder of at most 8 small
files: what was found (page.md, found.json), logs, and records. It writes them every minute, so that a cut
loses one minute. The data may come later: the study waits for them. Without a GPU, or with `--dry`, the same
steps run at toy size on the CPU; one that is skipped or fails is an error there.
"""
import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# What runs side by side, and the most seconds that it gets of eleven minutes; `modes` gets what the others
# left.
PLAN = [(("checks", "study"), 500), (("profile",), 50), (("ranks",), 80), (("modes",), 0)]
STEPS = [step for steps, _ in PLAN for step in steps]
PACKING = 20  # seconds kept for the end
EVERY = 60.0  # seconds between two times that the findings are written
PART = 15 * 2**20  # bytes of a part of the records, at most
PARTS = 4
GRACE = 12  # seconds between asking a step to end and ending it


def has_gpu():
    """Does torch see a GPU? Asked in another process: this one stays without torch."""
    probe = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", probe], stderr=subprocess.DEVNULL).returncode == 0


def begin_anew(steps, work):
    """Remove what an earlier call left of steps, and what they found; only the study goes on in it."""
    anew = set(steps) - {"study"}
    for step in anew:
        shutil.rmtree(work / step, ignore_errors=True)
    kept = rows(work, set(STEPS) - anew)
    (work / "found.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


def start(step, work, dry, seconds, given):
    """A step in a process group of its own; `given` are more arguments of `steps.py`."""
    command = [sys.executable, str(HERE / "steps.py"), step, "--work", str(work), "--seconds", str(seconds)]
    command += [*given, *(["--toy", "--device", "cpu"] if dry else [])]
    # A CPU compiles for minutes: one step of the dry run does, and the others go the same way without.
    alone = dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="") if dry else dict(OMP_NUM_THREADS="4")
    if dry and step != "checks":
        alone["TORCH_COMPILE_DISABLE"] = "1"
    caches = dict(TORCHINDUCTOR_CACHE_DIR=str(work / "inductor"), TRITON_CACHE_DIR=str(work / "triton"))
    env = os.environ | dict(PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1") | caches | alone
    with open(work / f"{step}.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=env, start_new_session=True)


def end(process):
    """Ask a step and its processes to end, then end them."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            pass


def follow(steps, ended, work, dry, seconds, given, write):
    """Run steps side by side to their end or the end of their time; `ended` gets (step, seconds, 'done',
    'failed' or 'cut') of each, as it ends. `write` is called every minute with those that run and their
    seconds."""
    begun, running = time.monotonic(), {}
    written = begun
    begin_anew(steps, work)
    try:
        for step in steps:
            running[step] = start(step, work, dry, seconds, given)
        while running:
            time.sleep(0.1)
            late = time.monotonic() - begun > seconds
            if time.monotonic() - written > EVERY:
                written = time.monotonic()
                write([(step, written - begun, "running") for step in running])
            for step, process in list(running.items()):
                if process.poll() is None and not late:
                    continue
                status = "cut" if process.poll() is None else "failed" if process.returncode else "done"
                end(process)  # its children too
                ended.append((step, time.monotonic() - begun, status))
                del running[step]
    finally:
        for step, process in running.items():
            end(process)
            ended.append((step, time.monotonic() - begun, "cut"))


def rows(work, steps):
    """What these steps found; of what was found again, by another call, the last."""
    file = work / "found.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return list({(row["step"], row["what"]): row for row in found if row["step"] in steps}.values())


def log_files(work):
    return sorted(file for file in work.rglob("*.log") if "inductor" not in file.parts)


def cell(value):
    """A finding as a table shows it."""
    text = f"{value:,.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def page(work, about, ended, wanted):
    """The findings beside their goals, as Markdown."""
    seen = {step: (seconds, status) for step, seconds, status in ended}
    found = rows(work, seen)  # not what an earlier call left
    good = [row for row in found if row["met"] == "yes"]
    missed = [row for row in found if row["met"] == "no"]
    bad = [step for step in wanted if seen.get(step, (0, "not run"))[1] in ("failed", "not run")]
    lines = [f"# {about['title']}", "", f"{len(good)} of {len(good) + len(missed)} goals met"
             + (f"; missed: {'; '.join(row['what'] for row in missed)}" if missed else "")
             + (f". Failed: {', '.join(bad)}." if bad else ". No step failed."), "", about["what"], "",
             "| step | seconds | ended |", "|---|---|---|"]
    for step in wanted:
        seconds, status = seen.get(step, (0, "not run"))
        lines.append(f"| {step} | {seconds:.0f} | {status} |")
    for step in wanted:
        mine = [row for row in found if row["step"] == step]
        lines += ["", f"## {step}", ""]
        if mine:
            lines += ["| what | found | goal | met |", "|---|---|---|---|"]
            for row in mine:
                value = f"{cell(row['value'])} {row['unit']}"
                lines.append(f"| {cell(row['what'])} | {value} | {row['goal']} | {row['met']} |")
        if seen.get(step, (0, ""))[1] in ("failed", "cut") and (log := work / f"{step}.log").is_file():
            said = log.read_text(errors="replace").splitlines()
            lines += ["", f"Its log ends ({seen[step][1]}):", "", "```", *said[-12:], "```"]
    return "\n".join([*lines, ""])


def about_here(dry):
    """Title and machine, asked in another process."""
    probe = "import json; from vitdistill.runs import environment; print(json.dumps(environment()))"
    told = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    said = told.stdout.strip().splitlines()
    here = json.loads(said[-1]) if said else {}
    machine = ", ".join(here.get("gpus", [])) or "a GPU"
    if dry:
        machine = "a CPU, at toy size: times and rates mean nothing"
    parts = [name for name in ("python", "torch", "torchvision", "timm") if name in here]
    versions = ", ".join(f"{name} {here[name]}" for name in parts)
    changed = " with uncommitted changes" * bool(here.get("uncommitted"))
    commit = here.get("commit", "")[:8] or os.environ.get("VITDISTILL_COMMIT", "unknown")
    processor = f"{here.get('processor', '')}, {here.get('cores', '?')} cores"
    where = f"{processor}, {versions}, commit {commit}{changed}"
    return dict(here, title=f"What was found on {machine}", what=f"{time.strftime('%Y-%m-%d')}, {where}.")


def packed(files, base, out, name, parts):
    """Files in parts of at most `PART` bytes, each a tar.gz of its own; returns what found no room."""
    bins, left_out = [], []
    for file in files:
        data = file.read_bytes()[-(2**24):]  # of a log, its end
        size = len(zlib.compress(data, 1)) + 2048
        if bins and bins[-1][0] + size <= PART:
            bins[-1][0] += size
            bins[-1][1].append((file, data))
        elif size <= PART and len(bins) < parts:
            bins.append([size, [(file, data)]])
        else:
            left_out.append(str(file.relative_to(base)))
    for i, (_, content) in enumerate(bins):
        number = f"-{i}" if parts > 1 else ""
        with tarfile.open(out / f"{name}{number}.tar.gz", "w:gz", compresslevel=6) as tar:
            for file, data in content:
                info = tarfile.TarInfo(str(file.relative_to(base)))
                info.size, info.mtime = len(data), int(file.stat().st_mtime)
                tar.addfile(info, io.BytesIO(data))
    return left_out


def pack(work, out):
    """Records (run folders, cards) and logs, in few small files; returns what found no room."""
    small = ".yaml", ".json", ".csv", ".npz", ".jsonl"
    heavy = {"inductor", "triton"}
    files = [file for file in sorted(work.rglob("*")) if file.is_file() and not heavy & set(file.parts)]
    records = [file for file in files if file.suffix in small]
    logs = log_files(work)
    records.sort(key=lambda file: file.suffix == ".npz")  # the small ones first
    return packed(records, work, out, "records", PARTS) + packed(logs, work, out, "logs", 1)


def tell(work, out, about, ended, wanted):
    """Write the page and the findings, as they are so far."""
    text = page(work, about, ended, wanted)
    (out / "page.md").write_text(text)
    steps = [dict(zip(("step", "seconds", "ended"), row)) for row in ended]
    found = rows(work, [step for step, *_ in ended])
    (out / "found.json").write_text(json.dumps(dict(about=about, steps=steps, found=found), indent=1))
    return text


def choose(plan, names):
    """The plan's steps of these names; a wrong name is an error."""
    if wrong := set(names) - set(STEPS):
        sys.exit(f"no step {', '.join(sorted(wrong))}: choose from {', '.join(STEPS)}")
    kept = [(tuple(step for step in steps if step in names), seconds) for steps, seconds in plan]
    return [(steps, seconds) for steps, seconds in kept if steps]


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="at toy size on the CPU, as without a GPU")
    parser.add_argument("--out", default="out/gpu", help="folder of what is kept; what was there is removed")
    parser.add_argument("--work", default="", help="folder of checkpoints and compiled programs, where the "
                        "next call finds them; default: a temporary one")
    data = os.environ.get("VITDISTILL_DATA", "")
    parser.add_argument("--data", default=data,
                        help="holds cifar-100-python/ and weights/; default: $VITDISTILL_DATA")
    parser.add_argument("--minutes", type=float, default=11, help="after which all is over")
    parser.add_argument("--steps", default="", help=f"some of the steps: {','.join(STEPS)}")
    parser.add_argument("--seed", type=int, default=1, help="of the study")
    parser.add_argument("--annealed", action="store_true", help="the study anneals over 60 epochs, not 2,000")
    return parser.parse_args(arguments)


def main(arguments=None):
    args, begun = parse(arguments), time.monotonic()
    dry = args.dry or not has_gpu()
    wanted = [step for step in STEPS if not args.steps or step in args.steps.split(",")]
    plan = choose(PLAN, args.steps.split(",") if args.steps else wanted)
    if dry:  # side by side; a CPU that others use too is slow, and nothing waits for it
        plan = [(tuple(wanted), 600)]
    out = (ROOT / args.out).resolve()
    for file in ("page.md", "found.json", "logs.tar.gz", *(f"records-{i}.tar.gz" for i in range(PARTS))):
        (out / file).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    work = Path(args.work or tempfile.mkdtemp(prefix="vitdistill-gpu-")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    about = about_here(dry)
    ended = []
    whole = False
    all_seconds = 60 * args.minutes

    def left():
        return all_seconds - (time.monotonic() - begun) - min(PACKING, all_seconds / 20)

    scale = min(1.0, all_seconds / (60 * 11)) if len(plan) == len(PLAN) else 1.0
    given = ["--data", args.data, "--seed", str(args.seed), *(["--annealed"] if args.annealed else [])]
    def write(running=()):
        left_out = pack(work, out)
        return tell(work, out, about, [*ended, *running], wanted), left_out
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))
    try:
        with contextlib.suppress(SystemExit):  # steps have sessions of their own: `follow` ends them
            for steps, most in plan:
                seconds = max(GRACE, min(left() - GRACE, most * scale if most else left() - GRACE))
                if dry:
                    seconds = most
                print(f"{', '.join(steps)}: at most {seconds:.0f} s", flush=True)
                follow(steps, ended, work, dry, seconds, given, write)
                for step, spent, status in ended[-len(steps):]:
                    print(f"{step} {status} after {spent:.0f} s", flush=True)
                write()
            whole = True
        text, left_out = write()
    finally:
        signal.signal(signal.SIGTERM, before)
        if not args.work:
            shutil.rmtree(work, ignore_errors=True)
    print(f"\n{text}")
    if left_out:
        print(f"no room for {len(left_out)} files, among them {', '.join(left_out[:5])}")
    print(f"wrote {out} in {time.monotonic() - begun:.0f} s")
    bad = [step for step, _, status in ended if status == "failed" or dry and status == "cut"]
    if bad:
        print(f"failed: {', '.join(bad)}", file=sys.stderr)
    return 0 if whole and len(ended) == len(wanted) and not bad else 1


if __name__ == "__main__":
    sys.exit(main())
