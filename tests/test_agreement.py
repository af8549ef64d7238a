"""The notebook on agreement: on the committed runs, on a CIFAR-100 study of several seeds, on damaged runs, on none."""
import re

import numpy as np
import pandas as pd
import pytest
from test_analysis import same_as_committed
from forked_notebooks import analyse
from vitdistill.config import Config, save
from vitdistill.runs import RunWriter

FIGURES = ["agreement_classes", "agreement_disagreement", "agreement_noise", "agreement_reliability",
           "agreement_teacher"]
TEACHER = dict(experiment="teacher", student="vit_tiny_patch16_224")


def looked_at(folder, **parameters):
    """Everything that the notebook says, and the folder of what it wrote."""
    notebook = analyse("a05_agreement", folder / "a05.ipynb", out=str(folder / "out"), **parameters)
    said = "".join("".join(output.get("text", "")) for cell in notebook["cells"] for output in cell.get("outputs", []))
    return said, folder / "out"


def write_run(folder, arrays, **over):
    """A run folder with given predictions, as training leaves one."""
    config = Config(dataset="cifar100", runs_dir=str(folder / "runs"), work_dir=str(folder / "work"), **over)
    run = RunWriter.of(config)
    save(config, run.folder / "config.yaml")
    run.save_predictions(**arrays)
    run.finish({})
    return run


def answer(rng, label, right, follow=None, share=0.0):
    """Answers that are `right` of the time the label; of the others `share` are those of `follow`."""
    other = rng.integers(0, 100, len(label))
    wrong = other if follow is None else np.where(rng.random(len(label)) < share, follow, other)
    return np.where(rng.random(len(label)) < right, label, wrong)


@pytest.fixture
def cifar(tmp_path):
    """A simulated teacher, and for three seeds a plain student and one that in part repeats it; CIFAR-100's sizes."""
    rng = np.random.default_rng(0)
    labels = {part: np.repeat(np.arange(100), n // 100) for part, n in dict(test=10_000, val=1000, train=9000).items()}
    taught_by = {part: answer(rng, label, 0.84) for part, label in labels.items()}

    def arrays(decide):
        found = {}
        for part, label in labels.items():
            found |= {f"{part}_image": np.arange(len(label)), f"{part}_label": label,
                      f"{part}_class_decision": decide(part, label),
                      f"{part}_class_confidence": rng.beta(5, 1.5, len(label)).astype("float16")}
        return found

    teacher = write_run(tmp_path, arrays(lambda part, label: taught_by[part]), **TEACHER)
    for seed in (1, 2, 3):
        write_run(tmp_path, arrays(lambda part, label: answer(rng, label, 0.70)), seed=seed)
        write_run(tmp_path, arrays(lambda part, label: answer(rng, label, 0.72, taught_by[part], 0.3)), seed=seed,
                  experiment="distilled", teacher="vit_tiny_patch16_224", distillation="hard",
                  teacher_weights=str(teacher.model))
    return tmp_path


def test_on_committed_runs(tmp_path):
    """Every picture is drawn, and what is written is what is committed."""
    _, out = looked_at(tmp_path, reports="reports/runs")
    assert {path.stem for path in (out / "figures").glob("*.svg")} == set(FIGURES)
    same_as_committed(out)


def test_on_several_seeds_of_cifar100_and_damaged_runs(cifar):
    """Numbers put in come out, superclasses are named, and what can't be read is said while the rest is drawn."""
    short, torn = (write_run(cifar, {}, seed=seed) for seed in (8, 9))
    (short.folder / "predictions.npz").unlink()
    (short.folder / "result.json").unlink()
    (torn.folder / "predictions.npz").write_bytes(b"PK\x03\x04")
    said, out = looked_at(cifar, reports=str(cifar / "runs"))
    assert f"{short.name} has no predictions.npz, for it was cut short" in said
    assert f"{torn.folder / 'predictions.npz'} is damaged" in said
    table = {name: pd.read_csv(out / "tables" / f"agreement_{name}.csv")
             for name in ("teacher", "superclasses", "classes", "image_noise", "seed_noise", "disagreement")}
    assert len(table["superclasses"]) == 20
    assert len(table["classes"]) == 100 and "aquatic mammals" in set(table["classes"].superclass)
    sides = table["teacher"].set_index(["student", "part"])["there with the teacher (%)"]
    assert sides["taught", "test"] == pytest.approx(28 * 0.3, abs=1.5)
    assert sides["labels alone", "test"] < 1  # 28% wrong, 30% of them the teacher's
    noise = table["seed_noise"].iloc[0]
    assert noise["pairs of seeds"] == 3
    assert noise["mean difference (points)"] == pytest.approx(table["image_noise"]["difference (points)"].mean())
    # the teacher's error; one wrong draw in 100 is the label
    assert table["disagreement"].iloc[1, 1] == pytest.approx(16 * 0.99, abs=1.2)
    assert {path.stem for path in (out / "figures").glob("*.svg")} == set(FIGURES)


def test_many_arms_by_several_teachers(tmp_path):
    """The table has every arm and at most 4 seeds of each; the plain arm is compared with each set of answers alone."""
    rng, label = np.random.default_rng(0), np.repeat(np.arange(10), 20)

    def run(right, **over):
        arrays = {f"{part}_{name}": value for part in ("test", "val", "train") for name, value in
                  dict(image=np.arange(200), label=label, class_decision=answer(rng, label, right),
                       class_confidence=np.full(200, 0.6, "float16")).items()}
        return write_run(tmp_path, arrays, **over)

    def taught(first, second=None, **over):
        folds = dict(fold_weights=str(second.model)) if second else {}
        for seed in (1, 2, 3, 4):
            run(0.5, experiment="distilled", distillation="hard", teacher=first.config.student, seed=seed,
                teacher_weights=str(first.model), teacher_hash="two" if second else "one", **folds, **over)

    vit, convnet = ([run(right, experiment="teacher", student=student, fold=fold) for fold in ("1/2", "2/2")]
                    for student, right in (("vit_tiny_patch16_224", 0.9), ("mobilenetv2_100", 0.6)))
    whole = run(0.7, experiment="teacher", student="mobilenetv2_100")
    for seed in range(1, 7):
        run(0.4, seed=seed)
    for alpha in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
        taught(*vit, alpha=alpha)
    taught(*convnet)
    taught(whole)
    _, out = looked_at(tmp_path, reports=str(tmp_path / "runs"))

    titles = pd.read_csv(out / "tables" / "agreement_disagreement.csv").iloc[1:, 0]
    read = titles.str.replace(r", seed \d$", "", regex=True)
    arms = pd.read_csv(out / "tables" / "agreement_calibration.csv").query("part == 'test'").model
    assert sorted(set(read)) == sorted(arms) and len(arms) == 15 and (read == "labels alone").sum() == 4

    table = pd.read_csv(out / "tables" / "agreement_teacher.csv").query("student == 'labels alone' and part == 'train'")
    assert set(table.teacher) == {"teacher mobilenetv2_100, seed 1", "teachers of two folds (mobilenetv2_100), seed 1",
                                  "teachers of two folds (vit_tiny_patch16_224), seed 1"}
    picture = (out / "figures" / "agreement_teacher.svg").read_text()  # matplotlib writes each text in a comment
    drawn = re.findall(r"<!-- (.*): ([\d,]+) answers differ from the label -->", picture)
    numbers = table.set_index("teacher")["teacher against label (images)"]
    assert drawn and all(number == f"{numbers[teacher]:,.0f}" for teacher, number in drawn)


@pytest.mark.slow
def test_without_runs_says_so(tmp_path):
    said, out = looked_at(tmp_path, reports=str(tmp_path / "none"))
    assert f"No run with predictions in {tmp_path / 'none'}: nothing is drawn." in said and not out.exists()
