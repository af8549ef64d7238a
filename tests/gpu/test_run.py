"""`make gpu` itself: it goes on after a step that fails or takes too long, says which, and leaves few small
files."""
import json
import os
import subprocess
import sys
import time

import pytest
import run

GOOD = """
import json, pathlib, sys, time
work = pathlib.Path(sys.argv[2])
row = dict(step=sys.argv[1], what="a rate", value=3.0, unit="images/s", goal=">= 2", met="yes")
open(work / "found.jsonl", "a").write(json.dumps(row) + chr(10))
(work / sys.argv[1]).mkdir(exist_ok=True)
(work / sys.argv[1] / f"{time.time_ns()}.csv").touch()
"""
SCRIPTS = dict(checks=GOOD, profile="raise SystemExit(3)", ranks="import time; time.sleep(60)", modes=GOOD,
               study=GOOD)


@pytest.fixture
def short(monkeypatch):
    """Steps that are a line of Python each, and seconds for them."""
    def start(step, work, dry, seconds, given):
        with open(work / f"{step}.log", "w") as log:
            command = [sys.executable, "-c", SCRIPTS[step], step, str(work)]
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    monkeypatch.setattr(run, "start", start)
    monkeypatch.setattr(run, "GRACE", 1)
    monkeypatch.setattr(run, "PLAN", [(steps, seconds and 4) for steps, seconds in run.PLAN])
    monkeypatch.setattr(run, "about_here", lambda dry: dict(title="Title", what="What."))


def test_it_goes_on_and_says_which_failed(short, monkeypatch, tmp_path, capsys):
    """As on a GPU: a failed step and one that was cut leave the others their turn; the exit status tells."""
    monkeypatch.setattr(run, "has_gpu", lambda: True)
    monkeypatch.setattr(run, "EVERY", 1.0)
    seen, tell = [], run.tell
    monkeypatch.setattr(run, "tell", lambda *given: seen.append(tell(*given)) or seen[-1])
    assert run.main(["--out", str(tmp_path)]) == 1
    assert any("| ranks |" in page and "| running |" in page for page in seen)  # what a cut would have left
    found = json.loads((tmp_path / "found.json").read_text())
    ended = {step["step"]: step["ended"] for step in found["steps"]}
    assert ended == dict.fromkeys(SCRIPTS, "done") | dict(profile="failed", ranks="cut")
    assert {row["step"] for row in found["found"]} == {"checks", "modes", "study"}
    assert "failed: profile" in capsys.readouterr().err and "profile" in (tmp_path / "page.md").read_text()


ENDLESS = """
import subprocess, sys, run
def start(step, *_):
    seconds = 0 if step == "study" else 60
    code = f"import time; time.sleep({seconds})"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    print(process.pid, flush=True)
    return process
run.start, run.has_gpu, run.about_here = start, lambda: True, lambda dry: dict(title="Title", what="What.")
sys.exit(run.main(sys.argv[1:]))
"""


def test_told_to_end_it_ends_its_steps_and_keeps_what_was_found(tmp_path):
    """A step has a session of its own, and would go on beside whatever the device is asked next."""
    command = [sys.executable, "-c", ENDLESS, "--out", str(tmp_path), "--steps", "checks,study"]
    whole = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=run.HERE)
    assert "at most" in whole.stdout.readline()
    steps = [int(whole.stdout.readline()) for _ in range(2)]
    with pytest.raises(ProcessLookupError):
        for _ in range(600):  # until one of the two has ended
            os.kill(steps[1], 0)
            time.sleep(0.05)
    time.sleep(0.3)  # and is noted
    whole.terminate()
    assert whole.wait(60) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    ended = {step["step"]: step["ended"] for step in found["steps"]}
    assert ended == dict(checks="cut", study="done")
    assert "No step failed" in (tmp_path / "page.md").read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(steps[0], 0)


def test_a_second_call_finds_what_the_first_left(short, monkeypatch, tmp_path):
    """The study's checkpoints; other steps begin anew, and a call tells of its own steps, each finding
    once."""
    work, out = tmp_path / "work", tmp_path / "out"
    def call(steps):
        status = run.main(["--dry", "--out", str(out), "--work", str(work), "--steps", steps])
        return status, sorted(row["step"] for row in json.loads((out / "found.json").read_text())["found"])
    for _ in range(2):
        assert call("modes,study") == (0, ["modes", "study"])
    assert [len(list((work / step).iterdir())) for step in ("modes", "study")] == [1, 2]
    monkeypatch.setitem(SCRIPTS, "modes", "")
    assert call("checks,modes") == (0, ["checks"]) and "\n1 of 1 goals met" in (out / "page.md").read_text()
    assert [row["step"] for row in run.rows(work, run.STEPS)] == ["study", "checks"]


@pytest.mark.parametrize(("steps", "status"), [("checks,study", 0), ("checks,profile", 1)])
def test_a_dry_run_fails_with_its_steps(short, steps, status, tmp_path):
    """What CI looks at."""
    assert run.main(["--dry", "--out", str(tmp_path), "--steps", steps]) == status
