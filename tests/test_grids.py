"""Grids as processes: a cell that is told to stop, a machine without Slurm, a folder that is in use."""
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from conftest import ROOT, TINY, environment, processes_mentioning, record, wait_until
from vitdistill.config import Config
from vitdistill.launch.queue import cell_runs, config_of, grid_cells, main, read_record, write_record
from vitdistill.runs import lock_folder
from vitdistill.study.compare import draw_forest, load_comparison, missing, write


@pytest.fixture
def grid(tmp_path):
    """One cell that trains for seconds; its checkpoints are an hour apart."""
    given = dict(preset="demo", student="vit_tiny_patch16_224", student_kwargs=TINY, data_fraction=0.4,
                 epochs=60, device="cpu", precision="fp32", threads=1, checkpoint_seconds=3600.0,
                 runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"))
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(dict(arms=dict(plain=dict(notebook="e01_baseline_resnet50", **given)))))
    return file


def command(*words):
    return [sys.executable, "-m", "vitdistill.launch.queue", *map(str, words)]


@pytest.mark.slow
def test_a_cell_that_is_told_to_stop_goes_on_later(grid, tmp_path):
    """SIGTERM, as a job of a cluster gets it: the ranks save and end, the table says so, the rest is trained
    later."""
    cell, out = grid_cells(grid, tmp_path / "out/grid")[0], tmp_path / "out"
    write_record(cell)
    process = subprocess.Popen(command(cell.file(".json")), cwd=ROOT, env=environment())
    try:
        assert wait_until(lambda: cell_runs(cell) and cell_runs(cell)[-1].epochs_done >= 3, 120)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    run = cell_runs(cell)[-1]
    assert read_record(cell)["state"] == "cut" and run.status == "interrupted"
    assert run.checkpoint()["epochs"] >= run.epochs_done - 1 >= 2  # though none was due
    assert wait_until(lambda: not processes_mentioning(str(run.work)), 20)
    status = subprocess.run(command(grid, "--out", out, "--status"), cwd=ROOT, env=environment(),
                            capture_output=True, text=True)
    assert status.returncode == 0
    assert status.stdout.splitlines()[1].split()[:2] == ["cut", f"{run.epochs_done}/60"]
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
    with pytest.raises(SystemExit, match=r"^there is no Slurm here .*sbatch") as refused:
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


def test_what_a_grid_trains_is_what_a_comparison_waits_for(tmp_path, capsys):
    """Arms with seeds of their own, in each way to write them, and names with the signs that texts are joined
    by."""
    file = tmp_path / "mine.yaml"
    plain = dict(notebook="e01_baseline_resnet50")
    arms = {"plain": plain, "vit - small": plain | dict(lr=0.1, seed=7),
            "a/b, c=d + e": plain | dict(lr=0.2, seed=2), "two": plain | dict(lr=0.3, seeds=[2, 9]),
            "some": plain | dict(lr=0.4, seeds=[1, 3]), "hard | soft": plain | dict(lr=0.5)}
    common = dict(preset="demo", runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"))
    study = dict(common=common, seeds=[1, 2, 3], baseline="plain", arms=arms, later=[9])
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    cells, trained = grid_cells(file), {}
    for cell in cells:
        trained.setdefault(cell.arm.partition("/")[2], []).append(cell.chosen["seed"])
    assert trained == {"plain": [1, 2, 3], "vit - small": [7], "a/b, c=d + e": [2], "two": [2, 9],
                       "some": [1, 3], "hard | soft": [1, 2, 3]}
    waits = [note for note in missing(load_comparison(file)) if "not begun with seed" in note]
    assert "vit - small: not begun with seed 7." in waits and "two: not begun with seed 2, 9." in waits
    for n, cell in enumerate(cells):
        metrics = pd.DataFrame(dict(epoch=[0], test_top1=[0.5]))
        record(config_of(cell), cell.arm, metrics=metrics, test_top1=0.5)
        assert n + 1 == len(cells) or any("not begun" in note for note in missing(load_comparison(file)))
    [note] = missing(load_comparison(file))
    assert "vit - small" in note and "plain" in note
    main([str(file), "--out", str(tmp_path / "out"), "--status"])
    assert f"{len(cells)} done" in capsys.readouterr().out
    rows = load_comparison(file).table().set_index("arm")
    seeds = {"a/b, c=d + e": 1, "two": 1, "some": 2, "hard | soft": 3}  # that both have
    assert rows.seeds.to_dict() == seeds
    drawn = [label.get_text() for label in draw_forest(load_comparison(file)).axes[0].get_yticklabels()]
    assert drawn == [*rows.index]
    page = write(load_comparison(file), tmp_path / "page").read_text()
    assert all(arm in page for arm in rows.index)


def test_an_arm_of_any_name_is_in_the_forest(tmp_path):
    """A difference of gains is not: its points are no difference of two arms."""
    file, arms = tmp_path / "mine.yaml", ["plain", "vit - small", "plain - vit", "other"]
    for n, arm in enumerate(arms):
        for seed in (1, 2):
            config = Config(runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"), seed=seed,
                            lr=0.1 + n)
            record(config, f"mine/{arm}", test_top1=0.5 + 0.1 * n + 0.01 * seed)
    told = {arm: dict(notebook="e01_baseline_resnet50", lr=0.1 + n) for n, arm in enumerate(arms)}
    gains = [["other", "plain"], ["vit - small", "plain"]]
    study = dict(common=dict(runs_dir=str(tmp_path / "runs")), arms=told, baseline="plain", compare=[gains],
                 seeds=[1, 2])
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    comparison = load_comparison(file)
    assert len(comparison.table()) == 4
    axes = draw_forest(comparison).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == arms[1:]
    drawn = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D"]
    assert drawn == pytest.approx([10, 20, 30])
