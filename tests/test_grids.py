"""Grids as processes: a cell that is told to stop, a machine without Slurm, a folder that is in use."""
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, TINY, environment, processes_mentioning, wait_until
from vitdistill.grids import grid_cells, main, noted_runs, read_record, write_record
from vitdistill.runs import lock_folder


@pytest.fixture
def grid(tmp_path):
    """One cell that trains for seconds; its checkpoints are an hour apart."""
    given = dict(preset="demo", student="vit_tiny_patch16_224", student_kwargs=TINY, data_fraction=0.4, epochs=60,
                 device="cpu", precision="fp32", threads=1, checkpoint_seconds=3600.0,
                 runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"))
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(dict(arms=dict(plain=dict(notebook="e01_baseline_resnet50", **given)))))
    return file


def command(*words):
    return [sys.executable, "-m", "vitdistill.grids", *map(str, words)]


@pytest.mark.slow
def test_a_cell_that_is_told_to_stop_goes_on_later(grid, tmp_path):
    """SIGTERM, as a job of a cluster gets it: the ranks save and end, the table says so, the rest is trained later."""
    cell, out = grid_cells(grid, tmp_path / "out/grid")[0], tmp_path / "out"
    write_record(cell)
    process = subprocess.Popen(command(cell.file(".json")), cwd=ROOT, env=environment())
    try:
        assert wait_until(lambda: noted_runs(cell) and noted_runs(cell)[-1].epochs_done >= 3, 120)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    run = noted_runs(cell)[-1]
    assert read_record(cell)["state"] == "cut" and run.status == "interrupted"
    assert run.checkpoint()["epochs"] >= run.epochs_done - 1 >= 2  # though none was due
    assert wait_until(lambda: not processes_mentioning(str(run.work)), 20)
    said = subprocess.run(command(grid, "--out", out, "--status"), cwd=ROOT, env=environment(), capture_output=True,
                          text=True)
    assert said.stdout.splitlines()[1].split()[:2] == ["cut", f"{run.epochs_done}/60"] and said.returncode == 0
    assert f"resumes after epoch {run.checkpoint()['epochs']}" in resumed(cell, run)


def resumed(cell, run):
    """The log of the run, started once more until it says where it begins."""
    process = subprocess.Popen(command(cell.file(".json")), cwd=ROOT, env=environment())
    try:
        assert wait_until(lambda: "resumes after" in (run.work / "log.txt").read_text(), 120)
    finally:
        process.terminate()
        process.wait(60)
    return (run.work / "log.txt").read_text()


def test_without_slurm_it_is_one_sentence(grid, tmp_path, monkeypatch):
    """On a machine that has none, nothing is written."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    with pytest.raises(SystemExit, match=r"^there is no Slurm here \(no sbatch on the PATH\)") as refused:
        main([str(grid), "--out", str(tmp_path / "out"), "--on", "slurm"])
    assert "\n" not in refused.value.code and not (tmp_path / "out").exists()


def test_two_grids_do_not_share_a_folder(grid, tmp_path):
    """Neither a grid that is being started, nor one whose cell runs, is disturbed by another of its name."""
    folder = tmp_path / "out/grid"
    folder.mkdir(parents=True)
    (folder / "000-e09_another.json").write_text("{}")
    busy = {"lock": "is in use by another process", "000-e09_another.lock": "is in use: 1 run"}
    for lock, told in busy.items():
        with lock_folder(folder, lock), pytest.raises(SystemExit) as refused:
            main([str(grid), "--out", str(tmp_path / "out")])
        assert told in refused.value.code and "\n" not in refused.value.code
    assert sorted(file.name for file in folder.glob("*.json")) == ["000-e09_another.json"]
