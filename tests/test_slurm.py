"""Grids on a real Slurm of two nodes, both this machine: `make test-slurm` (Debian's slurm-wlm and munge, as
root)."""
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from conftest import ROOT, TINY, assert_same, assert_same_losses, elsewhere, environment, run_of, wait_until
from vitdistill.config import save
from vitdistill.launch.queue import cell_runs, grid_cells, state_table, states_of
from vitdistill.runs import find_runs

pytestmark = pytest.mark.skipif("VITDISTILL_SLURM" not in os.environ,
                                reason="`make test-slurm` starts a Slurm")
PORT = 26817


def answer(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """munged, slurmctld and two slurmd, ended by the ids in their files; what is started by tests finds
    them."""
    if missing := [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]:
        pytest.fail(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge, and run this as root")
    folder = tmp_path_factory.mktemp("slurm")
    host = socket.gethostname()
    pids = {name: folder / f"{name}.pid" for name in ("munged", "slurmctld", "n1", "n2")}
    socket_file = folder / "munge.socket"
    (folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={PORT}
AuthType=auth/munge
AuthInfo=socket={socket_file},cred_expire=20
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2
ReturnToService=2
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={pids["slurmctld"]}
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={PORT + 1} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={PORT + 2} CPUs=1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
""")
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        shutil.chown(folder, "munge")  # its socket's folder is its own, and open to all
        for place in (folder, *folder.parents[:3]):
            place.chmod(place.stat().st_mode | 0o055)
        munged = [shutil.which("munged"), f"--socket={socket_file}", f"--pid-file={pids['munged']}",
                  f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"]
        subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", " ".join(munged)], check=True)
        subprocess.run(["slurmctld"], check=True)
        assert wait_until(lambda: subprocess.run(["sinfo"], capture_output=True).returncode == 0, 30)
        for node in ("n1", "n2"):
            subprocess.run(["slurmd", "-N", node], check=True)
        assert wait_until(lambda: answer("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"], 30)
        yield folder
    finally:
        subprocess.run(["scancel", "--me"])
        wait_until(lambda: not answer("squeue", "-h"), 40, poll=1)
        for name in ("n1", "n2", "slurmctld", "munged"):
            if pids[name].is_file():
                os.kill(int(pids[name].read_text()), signal.SIGTERM)
        ended = wait_until(lambda: not any(alive(file) for file in pids.values()), 30)
        del os.environ["SLURM_CONF"]
        assert ended


def alive(pid_file):
    try:
        os.kill(int(pid_file.read_text()), 0)
    except (OSError, ValueError):
        return False
    return True


def start(grid, folder, *words, **kw):
    command = [sys.executable, "-m", "vitdistill.launch.queue", str(grid), "--out", str(folder / "out")]
    command += words
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, **kw)


@functools.cache  # a poll that reads notebooks would see a run when it is over
def cells_of(grid):
    return grid_cells(grid, grid.parent / "out" / grid.stem)


def status(grid, folder):
    """(state, epochs) of each cell, and what `--status` prints."""
    said = state_table(states_of([replace(cell) for cell in cells_of(grid)], folder / "out" / grid.stem))
    rows = [line.split() for line in said.splitlines()[1:-1] if not line.startswith(" ")]
    return [(row[0], row[1]) for row in rows], said


def jobs_of(folder, name="grid"):
    """The job of each cell, in order."""
    jobs = json.loads((folder / "out" / name / "slurm.json").read_text())
    return [jobs[cell] for cell in sorted(jobs)]


def write_grid(folder, *cells, name="grid"):
    """A study whose cells train on a part of the digits for seconds, with runs in the folder."""
    folder.mkdir(exist_ok=True)
    common = dict(preset="demo", device="cpu", precision="fp32", teacher_precision="fp32", threads=1,
                  epochs=24, data_fraction=0.4, batch_size=64, student="vit_tiny_patch16_224",
                  student_kwargs=TINY, optimizer="adamw", lr=0.002, checkpoint_seconds=3600.0,
                  runs_dir=str(folder / "runs"), work_dir=str(folder / "work"))
    taught = dict(teacher="e00_teacher 0", allow_untrained=True)  # seconds make no good teacher
    parts = {}
    for n, (notebook, given) in enumerate(cells):
        more = taught if notebook.startswith("e02") else {}
        parts[f"{notebook} {n}"] = dict(notebook=notebook, **common, **more) | given
    study = dict(teachers={name: part for name, part in parts.items() if name.startswith("e00")},
                 arms={name: part for name, part in parts.items() if not name.startswith("e00")})
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder / f"{name}.yaml"


def run_of_cell(number, grid):
    return cell_runs(cells_of(grid)[number])[-1]


FOUR = (("e00_teacher", {}), ("e01_baseline_resnet50", {}), ("e02_distilled_resnet50", dict(seed=1)),
        ("e02_distilled_resnet50", dict(seed=2)))


def test_grid_ends_as_one_that_ran_here(slurm, tmp_path):
    """A teacher and three others; one job is told that its time is over, one is requeued: the same bits as
    here."""
    grid = write_grid(tmp_path / "slurm", *FOUR)
    folder = grid.parent
    begun = start(grid, folder, "--on", "slurm", "--time", "30")
    assert begun.returncode == 0, begun.stderr
    assert "4 waiting" in begun.stdout
    teacher, plain, *taught = jobs_of(folder)
    assert teacher.split("_")[0] == plain.split("_")[0] != taught[0].split("_")[0]  # an array of students

    def reached(number, epochs):
        try:
            return run_of_cell(number, grid).epochs_done >= epochs
        except IndexError:
            return False

    assert wait_until(lambda: reached(1, 2), 400)
    answer("scancel", "--signal=USR2", plain)
    plain_run = run_of_cell(1, grid)
    assert wait_until(lambda: status(grid, folder)[0][1][0] == "waiting", 60), status(grid, folder)[1]
    saved = plain_run.checkpoint()["epochs"]
    assert 2 <= saved < 24  # though checkpoints are an hour apart
    assert wait_until(lambda: reached(2, 2), 400, poll=1), status(grid, folder)[1]
    assert status(grid, folder)[0][0] == ("done", "24/24")
    answer("scontrol", "requeue", taught[0])
    again = start(grid, folder, "--on", "slurm")
    assert again.returncode == 1 and "run(s) of a study of that name are running or waiting" in again.stderr
    assert wait_until(lambda: all(state == "done" for state, _ in status(grid, folder)[0]), 600, poll=3), \
        status(grid, folder)[1]
    for number in (1, 2):
        log = (run_of_cell(number, grid).work / "log.txt").read_text()
        assert "resumes after epoch" in log, log
    assert f"resumes after epoch {saved}" in (plain_run.work / "log.txt").read_text()
    assert wait_until(lambda: not answer("squeue", "-h"), 60, poll=1)
    assert "4 done, 0 failed" in start(grid, folder, "--status").stdout

    here = write_grid(tmp_path / "here", *FOUR)
    local = start(here, here.parent, "--at-once", "2")
    assert local.returncode == 0, local.stdout
    pairs = [[run_of_cell(number, file) for place, file in ((folder, grid), (here.parent, here))]
             for number in range(4)]
    for one, other in pairs:
        assert_same(one, other)
    assert start(grid, folder, "--on", "slurm").returncode == 0
    assert not answer("squeue", "-h")  # nothing is left to do


def test_a_teacher_that_fails_takes_its_students_along(slurm, tmp_path):
    """Another cell isn't touched; nothing waits for ever; the table says why."""
    short = dict(epochs=1, data_fraction=0.2)
    nowhere = dict(dataset="imagefolder", image_size=32, data_root=str(tmp_path / "nowhere"))
    grid = write_grid(tmp_path / "slurm", ("e00_teacher", nowhere | short),
                      ("e01_baseline_resnet50", short), ("e02_distilled_resnet50", short))
    assert start(grid, grid.parent, "--on", "slurm").returncode == 0
    assert wait_until(lambda: not answer("squeue", "-h"), 400, poll=1)
    states, said = status(grid, grid.parent)
    assert [state for state, _ in states] == ["failed", "done", "failed"], said
    assert f"{tmp_path}/nowhere" in said and "not started, because a run that it waits for failed" in said


def test_a_cell_on_two_nodes(slurm, tmp_path):
    """Both carry the notebook out and meet by torchrun's rendezvous; the metrics are those of one rank."""
    short = dict(epochs=3, data_fraction=0.3)
    grid = write_grid(tmp_path / "slurm", ("e01_baseline_resnet50", short))
    here = write_grid(tmp_path / "here", ("e01_baseline_resnet50", short))
    assert start(grid, grid.parent, "--on", "slurm", "--nodes", "2").returncode == 0
    assert wait_until(lambda: not answer("squeue", "-h"), 400, poll=1)
    assert status(grid, grid.parent)[0] == [("done", "3/3")], status(grid, grid.parent)[1]
    assert start(here, here.parent).returncode == 0
    two, one = (run_of_cell(0, file) for file in (grid, here))
    assert "2 rank(s)" in (two.work / "log.txt").read_text()
    assert two.config.nnodes == 2 and len(find_runs(grid.parent / "runs")) == 1
    assert_same_losses(one, two, atol=2e-3)


def test_ranks_are_slurms_under_srun_only(slurm, tiny, tmp_path):
    """A job's script is one process, whatever the job's variables say; the tasks of srun are ranks."""
    config = elsewhere(tiny, tmp_path)
    save(config, tmp_path / "c.yaml")
    train = f"{sys.executable} -m vitdistill.train --config {tmp_path}/c.yaml"
    common = f"#!/bin/bash\n#SBATCH --ntasks=2\n#SBATCH --output={tmp_path}/%j.log\n#SBATCH --chdir={ROOT}\n"
    said = []
    for line in (train, f"MASTER_ADDR=127.0.0.1 MASTER_PORT=26999 srun {train}"):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        (tmp_path / "job.sh").write_text(f"{common}{line}\n")
        job = answer("sbatch", "--parsable", str(tmp_path / "job.sh")).strip()
        assert wait_until(lambda: not answer("squeue", "-h"), 400, poll=1)
        said.append((tmp_path / f"{job}.log").read_text())
        assert run_of(config).status == "done", said[-1]
    assert "1 rank(s) on cpu" in said[0] and "2 rank(s) on cpu" in said[1]


def test_what_slurm_refuses_is_one_sentence(slurm, tmp_path):
    """An unknown partition, a feature that no node has: said at once, nothing half-written or left in the
    queue."""
    grid = write_grid(tmp_path / "slurm", ("e00_teacher", {}), ("e02_distilled_resnet50", {}))
    (tmp_path / "cluster.yaml").write_text("more: {constraint: h200}")
    for words, told in ((["--partition", "mian"], "unknown partition 'mian': did you mean 'main'?"),
                        (["--cluster", str(tmp_path / "cluster.yaml")], "Slurm refuses the jobs (")):
        refused = start(grid, grid.parent, "--on", "slurm", *words)
        assert refused.returncode == 1 and refused.stderr.startswith(told) and refused.stderr.count("\n") == 1
        assert {state for state, _ in status(grid, grid.parent)[0]} == {"left"} and not answer("squeue", "-h")


def test_a_folder_that_the_node_does_not_see(slurm, tmp_path):
    """The job leaves without a word; the table says what may be wrong and where to look."""
    grid = write_grid(tmp_path / "slurm", ("e01_baseline_resnet50", {}))
    (tmp_path / "cluster.yaml").write_text("more: {begin: now+4}")
    cluster = str(tmp_path / "cluster.yaml")
    assert start(grid, grid.parent, "--on", "slurm", "--cluster", cluster).returncode == 0
    out = grid.parent / "out"
    out.rename(tmp_path / "unseen")  # as the node's own disk has no such folder
    assert wait_until(lambda: not answer("squeue", "-h"), 400, poll=1)
    shutil.rmtree(out, ignore_errors=True)
    (tmp_path / "unseen").rename(out)
    states, said = status(grid, grid.parent)
    assert [state for state, _ in states] == ["failed"]
    assert "ended without a record: does its node see" in said and f"See {out}/grid/slurm" in said
