"""Which runs a comparison counts: those that its study's file asks for as it stands now."""
import json
import shutil
from dataclasses import replace

import pytest
import yaml

from vitdistill.base import VitdistillError
from vitdistill.config import preset
from vitdistill.launch.queue import check_cells, grid_cells, main, record_of, states_of, study_cells
from vitdistill.launch.studies import Wanted, read_study
from vitdistill.runs import RunWriter
from vitdistill.study.compare import load_comparison, printed, write

BASELINE = dict(notebook="e01_baseline_resnet50")
TAUGHT = dict(notebook="e02_distilled_resnet50", teacher="vit")


@pytest.fixture
def project(tmp_path):
    """Writes study files and finished runs, each begun a day after the last."""
    return Project(tmp_path)


class Project:
    def __init__(self, folder):
        self.folder, self.days = folder, 0
        self.places = dict(runs_dir=str(folder / "runs"), work_dir=str(folder / "work"))
        self.common = dict(preset="demo", epochs=2) | self.places

    def study(self, name="mine", **values):
        file = self.folder / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(dict(common=self.common, seeds=[1, 2]) | values, sort_keys=False))
        return file

    def run(self, arm, top1, part="baseline", changes=None, result=None, version="0.3.0", **given):
        config = preset("demo", part, **self.places | dict(epochs=2, data_hash="1") | given)
        config = replace(config, **changes or {})
        run = RunWriter.of(config)
        run.begin(config, "made for a test")
        self.days += 1
        facts = run.environment | dict(begun=f"2026-01-{self.days:02d}T00:00:00+00:00", vitdistill=version)
        run._write_json("environment.json", facts)
        run.add_arm(arm)
        run.append(dict(epoch=0, lr=0.1, train_loss=1.0, test_top1=top1, seconds=1.0))
        run.finish(dict(test_top1=top1, epochs=config.epochs) | (result or {}))
        return run


def accuracy(file, arm="plain"):
    rows = load_comparison(file).accuracies().set_index("arm")
    return rows.top1[arm], rows.seeds[arm]


@pytest.mark.parametrize("edited", ["arm", "common", "removed", "preset", "notebook"])
def test_a_study_that_was_edited_and_taken_back_has_its_own_accuracies(project, edited):
    """The later runs have the same name of an arm and other settings, wherever the file was edited."""
    later = dict(arm=dict(lr=0.02), common=dict(epochs=3), removed=dict(momentum=0.5),
                 preset=dict(changes=dict(preset="quick", lr=0.3)), notebook=dict(part="distilled"))[edited]
    for seed in 1, 2:
        project.run("mine/plain", 0.5, seed=seed, lr=0.01)
        project.run("mine/plain", 0.9, **dict(seed=seed, lr=0.01) | later)
    file = project.study(arms=dict(plain=BASELINE | dict(lr=0.01)))
    assert accuracy(file) == (0.5, 2)
    text = printed(load_comparison(file))
    assert "2 runs of an older form of this file are left out" in text
    assert "left out" in write(load_comparison(file), project.folder / "out").read_text()


def test_two_projects_with_studies_of_one_name(project):
    for name, lr, top1 in ("one", 0.01, 0.5), ("two", 0.1, 0.9):
        for seed in 1, 2:
            project.run("study/plain", top1, seed=seed, lr=lr)
        project.study(f"{name}/study", arms=dict(plain=BASELINE | dict(lr=lr)))
    assert accuracy(project.folder / "one/study.yaml") == (0.5, 2)
    assert accuracy(project.folder / "two/study.yaml") == (0.9, 2)


def test_a_teacher_that_was_edited_takes_its_students_along(project, capsys):
    """From 8 to 24 epochs and from seeds 1 to 3 to seeds 1 and 2: only students of the new teacher count, and
    the state of the study says what is to do."""
    def teach(epochs, top1, seeds):
        weights = dict(weights_hash=f"{epochs}")
        teacher = project.run("mine/vit", top1, "teacher", epochs=epochs, result=weights)
        for seed in seeds:
            project.run("mine/taught", top1 - 0.1, "distilled", seed=seed, teacher_hash=f"file {epochs}",
                        teacher_weights=str(teacher.model), result=dict(teacher_card=weights))
    for seed in 1, 2, 3:
        project.run("mine/plain", 0.5, seed=seed)
    teach(8, 0.4, (1, 2, 3))
    arms = dict(plain=BASELINE, taught=TAUGHT)
    teachers = dict(vit=dict(notebook="e00_teacher", epochs=24))
    file = project.study(arms=arms, baseline="plain", teachers=teachers)
    cells = states_of(grid_cells(file, project.folder / "out"), project.folder, elsewhere=True)
    states = {str(cell): cell.state for cell in cells}
    assert states["taught seed=1"] == states["vit"] == "left" and states["plain seed=2"] == "done"
    teach(24, 0.7, (1, 2))
    [row] = load_comparison(file).table().itertuples()
    assert row.seeds == 2 and row.difference == pytest.approx(0.1)
    main([str(file), "--out", str(project.folder / "out"), "--status"])
    status = capsys.readouterr().out
    assert "5 done" in status and "epochs 8, not 24" in status and "plain: 1 run of an older form" in status
    lines = printed(load_comparison(file)).splitlines()
    assert lines[1].split()[:3] == ["vit", "(teacher)", "70.0%"]


def test_a_teacher_whose_record_is_lost_is_said(project):
    teacher = project.run("mine/vit", 0.7, "teacher", result=dict(weights_hash="1"))
    project.run("mine/taught", 0.6, "distilled", seed=1, teacher_weights=str(teacher.model),
                result=dict(teacher_card=dict(weights_hash="1")))
    teachers = dict(vit=dict(notebook="e00_teacher"))
    file = project.study(arms=dict(taught=TAUGHT), teachers=teachers)
    lost = "taught: the record of the teacher of distilled-"
    assert lost not in printed(load_comparison(file))
    shutil.rmtree(teacher.folder)
    assert lost in printed(load_comparison(file))


def test_a_teacher_below_the_plain_student_is_said(project):
    for seed in 1, 2:
        project.run("mine/plain", 0.5, seed=seed)
        project.run("mine/taught", 0.4, "distilled", seed=seed, teacher_hash="a", teacher_weights="x")
    project.run("mine/vit", 0.3, "teacher", result=dict(weights_hash="b"), epochs=24)
    teachers = dict(vit=dict(notebook="e00_teacher", epochs=24))
    file = project.study(arms=dict(plain=BASELINE, taught=TAUGHT), baseline="plain", teachers=teachers)
    assert "teacher is no run of mine/vit" in printed(load_comparison(file))  # but of unknown weights
    for seed in 1, 2:
        project.run("mine/taught", 0.4, "distilled", seed=seed, teacher_hash="c", teacher_weights="x",
                    result=dict(teacher_card=dict(weights_hash="b")))
    worse = "The teacher vit (30.0%) is worse than the plain student plain (50.0%)."
    assert worse in printed(load_comparison(file))


def test_a_preset_that_was_edited_since_is_named(project):
    """Its runs count, unless some of the same arm are of today's preset."""
    older = dict(weight_decay=0.3)
    for seed in 1, 2:
        project.run("mine/plain", 0.5, seed=seed, changes=older)
    file = project.study(arms=dict(plain=BASELINE))
    assert accuracy(file) == (0.5, 2)
    assert "preset was edited since (weight_decay 0.3" in printed(load_comparison(file))
    project.run("mine/plain", 0.9, seed=1)
    assert accuracy(file) == (0.9, 1)


def test_a_pattern_of_unlike_runs_has_no_mean(project):
    for seed, student in (1, "resnet18"), (2, "resnet18"), (2, "resnet50"):
        project.run("x/y", 0.3, seed=seed, student=student)
    alike = load_comparison(project.study(arms=dict(all=dict(runs="*-resnet50-*"))))
    assert [run.config.student for run in alike.arms["all"]] == ["resnet50"]
    unlike = load_comparison(project.study(arms=dict(all=dict(runs="baseline-*"))))
    assert unlike.arms["all"] == [] and "student 'resnet18' or 'resnet50'" in printed(unlike)


@pytest.mark.parametrize("one, other, is_one_run", [
    (dict(compile="none"), dict(compile="graph"), True), (dict(lr=0.01), dict(lr=None), True),
    (dict(memo=True), dict(memo=False), True), (dict(), dict(runs_dir="elsewhere"), False),
    (dict(lr=0.01), dict(lr=0.02), False), (dict(data_root="a"), dict(data_root="b"), False)])
def test_two_arms_that_would_be_one_run_are_refused(project, one, other, is_one_run):
    file = project.study(arms=dict(one=BASELINE | one, other=BASELINE | other))
    cells = study_cells(read_study(file))
    if is_one_run:
        with pytest.raises(VitdistillError, match="one seed=1 and other seed=1 are one run"):
            check_cells(cells)
    else:
        check_cells(cells)


@pytest.mark.parametrize("content", [b"\0" * 99, b"", None])
def test_a_record_that_can_not_be_read_is_named(project, content):
    runs = [project.run("mine/plain", 0.5, seed=seed) for seed in (1, 2)]
    config = runs[1].folder / "config.yaml"
    config.unlink() if content is None else config.write_bytes(content)
    assert runs[1].name in printed(load_comparison(project.study(arms=dict(plain=BASELINE))))


def test_seeds_on_different_images_are_said(project):
    for seed in 1, 2:
        project.run("mine/plain", 0.5, seed=seed, data_hash=str(seed))
    assert "plain: seeds 1 and 2 are on different images" in printed(
        load_comparison(project.study(arms=dict(plain=BASELINE))))


def test_a_small_copy_minus_an_arm_of_another_study_is_no_difference(project):
    """Two epochs minus three: only a file that says that epochs vary compares them."""
    for seed in 1, 2:
        project.run("mine/plain", 0.5, seed=seed)
        project.run("mine/half", 0.4, seed=seed, data_fraction=0.04, result=dict(n_train=50))
        project.run("long/plain", 0.8, seed=seed, epochs=3)
    longer = project.study("long", common=project.common | dict(epochs=3), arms=dict(plain=BASELINE))
    names = [run.name for run in load_comparison(longer).arms["plain"]]
    file = project.study(arms=dict(plain=BASELINE, long=dict(runs=names)), baseline="plain")
    comparison = load_comparison(file)
    assert not len(comparison.table()) and "their epochs are" in printed(comparison)
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(values | dict(varies=["epochs"])))
    assert load_comparison(file).table().difference.tolist() == pytest.approx([0.3])
    arms = dict(plain=BASELINE, half=BASELINE | dict(data_fraction=0.04))
    varied = load_comparison(project.study(arms=arms, baseline="plain"))
    assert varied.table().difference.tolist() == pytest.approx([-0.1])  # the file asks for this


def test_unlike_machines_are_said_and_the_difference_stays(project):
    for arm, lr, precision, version in ("plain", 0.01, "fp32", "0.2.0"), ("other", 0.02, "bf16", "0.3.0"):
        for seed in 1, 2:
            project.run(f"mine/{arm}", lr * 10, seed=seed, lr=lr, version=version,
                        changes=dict(precision=precision, auto=dict(precision=precision)))
    arms = dict(plain=BASELINE | dict(lr=0.01), other=BASELINE | dict(lr=0.02))
    comparison = load_comparison(project.study(arms=arms, baseline="plain"))
    assert len(comparison.table()) == 1
    assert all(word in printed(comparison) for word in ("fp32 in plain", "bf16 in other", "0.2.0 in plain"))


def test_holm_is_over_the_tests_that_a_study_names(project):
    rates = dict(plain=0.01, a=0.02, b=0.03, c=0.04)
    for arm, lr in rates.items():
        for seed in 1, 2:
            project.run(f"mine/{arm}", 0.3 + lr + 0.01 * seed * (1 + 9 * lr), seed=seed, lr=lr)
    arms = {arm: BASELINE | dict(lr=lr) for arm, lr in rates.items()}
    all_rows = load_comparison(project.study(arms=arms, baseline="plain")).table().set_index("arm")
    assert all_rows.holm.notna().all() and all_rows.holm["a"] > all_rows.p["a"]
    named = load_comparison(project.study(arms=arms, baseline="plain", tests=[["a", "plain"]]))
    one = named.table().set_index("arm")
    assert one.holm["a"] == one.p["a"] and one.holm[["b", "c"]].isna().all()
    with pytest.raises(VitdistillError, match="tests names the arm 'd'"):
        read_study(project.study(arms=arms, tests=[["d", "plain"]]))


def test_a_cell_of_slurm_knows_what_it_needs(project):
    """The record of a cell, as a job of a cluster reads it, holds what its teacher's run must have."""
    teachers = dict(vit=dict(notebook="e00_teacher", epochs=24))
    file = project.study(arms=dict(taught=TAUGHT), teachers=teachers)
    cells = grid_cells(file, project.folder)
    kept = json.loads(json.dumps(record_of(cells[-1])))
    assert [Wanted.read(one) for one in kept["makers"]["mine/vit"]] == cells[-1].makers["mine/vit"]
