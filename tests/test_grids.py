"""Grids as processes: a cell that is told to stop, a machine without Slurm, a folder that is in use."""
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from conftest import ROOT, TINY, environment, processes_mentioning, record, wait_until
from vitdistill import cli
from vitdistill.config import Config
from vitdistill.launch.queue import cell_runs, check_cells, grid_cells, main, read_record
from vitdistill.launch.queue import write_record
from vitdistill.launch.studies import read_study, small_copy, study_text
from vitdistill.runs import find_runs, lock_folder
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
        trained.setdefault(cell.arm.partition("/")[2], []).append(cell.seed)
    assert trained == {"plain": [1, 2, 3], "vit - small": [7], "a/b, c=d + e": [2], "two": [2, 9],
                       "some": [1, 3], "hard | soft": [1, 2, 3]}
    waits = [note for note in missing(load_comparison(file)) if "not begun with seed" in note]
    assert "vit - small: not begun with seed 7." in waits and "two: not begun with seed 2, 9." in waits
    for n, cell in enumerate(cells):
        metrics = pd.DataFrame(dict(epoch=[0], test_top1=[0.5]))
        record(cell.config, cell.arm, metrics=metrics, test_top1=0.5)
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


@pytest.mark.slow
def test_a_study_is_tried_small(tmp_path, monkeypatch, capsys):
    """A tenth of epochs and images, a weak teacher among them; the study itself counts none of these runs,
    even where it looks for its own in the same folder."""
    (tmp_path / ".vitdistill").touch()  # a root of its own
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.yaml"
    arms = dict(plain=dict(notebook="e01_baseline_resnet50"),
                taught=dict(notebook="e02_distilled_resnet50", teacher="vit"))
    common = dict(preset="demo", runs_dir="out/small/runs")
    study = dict(common=common, seeds=[1], arms=arms, baseline="plain",
                 teachers=dict(vit=dict(notebook="e00_teacher", epochs=30)))
    file.write_text(yaml.safe_dump(study, sort_keys=False))

    def vitdistill(*words):
        assert cli.main([*words]) == 0
        return capsys.readouterr().out

    vitdistill("grid", "mine.yaml", "--small", "--dry-run")
    assert {path.name for path in tmp_path.iterdir()} == {".vitdistill", "mine.yaml"}
    last = vitdistill("grid", "mine.yaml", "--small").splitlines()[-1]
    assert "3 done" in vitdistill("grid", "mine.yaml", "--small", "--status")
    _, _, compare = last.partition("vitdistill ")
    assert "taught minus plain" in vitdistill(*compare.split())
    assert "0 done" in vitdistill("grid", "mine.yaml", "--status")
    runs = {run.config.experiment: run for run in find_runs(tmp_path / "out/small/runs")}
    lengths = {name: (run.config.epochs, run.result["n_train"]) for name, run in runs.items()}
    assert {name: epochs for name, (epochs, _) in lengths.items()} == dict(teacher=3, baseline=2, distilled=2)
    # of 1,438 digits a tenth, of 115 that students have 5 a class; some of each are held out
    assert 100 < lengths["teacher"][1] < 144 and 30 <= lengths["baseline"][1] <= 50
    assert runs["distilled"].result["teacher_top1"] < 0.3  # refused elsewhere


def test_a_small_copy_trains_arms_of_other_studies(tmp_path):
    """By the other file's settings, with its teacher, without what the own file has in common; one that is
    named twice is trained once."""
    plain = dict(notebook="e01_baseline_resnet50")
    taught = dict(notebook="e02_distilled_resnet50", teacher="vit")
    other = dict(common=dict(preset="demo", lr=0.3), seeds=[1, 2, 3], arms=dict(plain=plain, taught=taught),
                 teachers=dict(vit=dict(notebook="e00_teacher", epochs=50)))
    own = dict(common=dict(preset="demo", weight_decay=0.1), seeds=[1, 2],
               teachers=dict(first="{}/vit"), baseline="theirs", compare=[["longer", "taught"]],
               arms=dict(theirs="{}/plain", taught="{}/taught", longer=plain | dict(epochs=40),
                         again=taught | dict(teacher="first")))
    (tmp_path / "nbs/studies").mkdir(parents=True)
    (tmp_path / "nbs/studies/theirs.yaml").write_text(yaml.safe_dump(other, sort_keys=False))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own, sort_keys=False).replace("{}", "theirs"))
    (tmp_path / ".vitdistill").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        copy = small_copy(read_study("mine.yaml"))
        (tmp_path / "copy.yaml").write_text(study_text(copy.study))
        cells = grid_cells("copy.yaml")
        check_cells(cells)
    assert not copy.left_out and copy.study.baseline == "theirs"
    assert copy.study.compare == [["longer", "taught"]]
    configs = {cell.name: cell.config for cell in cells}
    assert sorted(configs) == ["again seed=1", "again seed=2", "first", "longer seed=1", "longer seed=2",
                               *(f"taught seed={seed}" for seed in (1, 2, 3)),
                               *(f"theirs seed={seed}" for seed in (1, 2, 3))]
    assert configs["first"].epochs == 5 and configs["longer seed=1"].epochs == 4
    theirs, longer = configs["theirs seed=1"], configs["longer seed=1"]
    assert (theirs.lr, theirs.weight_decay) == (0.3, 0.0005) and longer.weight_decay == 0.1
    assert {cell.models["teacher_weights"] for cell in cells if cell.models} == {"copy/first"}


@pytest.mark.parametrize("file", sorted((ROOT / "nbs/studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_each_of_our_studies_has_a_small_copy(file, tmp_path):
    """Its file reads as it was made, its arms are unequal and its settings would train; what is left out has
    a reason."""
    study = read_study(file)
    copy, left_out = small_copy(study)
    path = tmp_path / f"{copy.name}.yaml"
    path.write_text(study_text(copy))
    assert read_study(path) == copy and all(part["part"] for part in copy.parts.values())
    assert {*study.arms} - {*left_out} <= {*copy.parts} and all(left_out.values())
    cells = grid_cells(path)
    check_cells(cells, here=False)
    assert all(cell.arm.startswith(f"{file.stem}-small/") for cell in cells)
    assert all(cell.config.runs_dir == "out/small/runs" for cell in cells)
