"""The notebook on agreement: on a CIFAR-100 study of several seeds, on damaged runs."""
import numpy as np
import pandas as pd
import pytest

from conftest import ROOT, record
from test_notebooks import definitions, execute
from vitdistill.config import Config
from vitdistill.stats import seed_interval

FIGURES = ["agreement_classes", "agreement_disagreement", "agreement_teacher"]
TEACHER = dict(experiment="teacher", student="vit_tiny_patch16_224")


def looked_at(folder, **parameters):
    """Everything that the notebook says, and the folder of what it wrote."""
    study = folder / "pair.yaml"  # with the seeds of the runs that are made up here
    study.write_text((ROOT / "nbs/studies/pair.yaml").read_text().replace("seeds: [1]", "seeds: [1, 2, 3]"))
    notebook = execute("a05_agreement", folder / "a05.ipynb", out=str(folder / "out"), study=str(study),
                       **parameters)
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    said = "".join("".join(output.get("text", "")) for output in outputs)
    return said, folder / "out"


def write_run(folder, arrays, arm="", **over):
    """A run folder with given predictions, as training leaves one; `arm` of the study pair."""
    config = Config(dataset="cifar100", runs_dir=str(folder / "runs"), work_dir=str(folder / "work"), **over)
    run = record(config, f"pair/{arm}", test_top1=0.5)
    run.save_predictions(**arrays)
    return run


def answer(rng, label, right, follow=None, share=0.0):
    """Answers that are `right` of the time the label; of the others `share` are those of `follow`."""
    other = rng.integers(0, 100, len(label))
    wrong = other if follow is None else np.where(rng.random(len(label)) < share, follow, other)
    return np.where(rng.random(len(label)) < right, label, wrong)


@pytest.fixture
def cifar(tmp_path):
    """A simulated teacher, and for three seeds a plain student and one that in part repeats it; CIFAR-100's
    sizes."""
    rng = np.random.default_rng(0)
    images = dict(test=10_000, val=1000, train=9000)
    labels = {part: np.repeat(np.arange(100), n // 100) for part, n in images.items()}
    taught_by = {part: answer(rng, label, 0.84) for part, label in labels.items()}

    def arrays(decide):
        found = {}
        for part, label in labels.items():
            found |= {f"{part}_image": np.arange(len(label)), f"{part}_label": label,
                      f"{part}_class_decision": decide(part, label),
                      f"{part}_class_confidence": rng.beta(5, 1.5, len(label)).astype("float16")}
        return found

    teacher = write_run(tmp_path, arrays(lambda part, label: taught_by[part]), "teacher", **TEACHER)
    for seed in (1, 2, 3):
        write_run(tmp_path, arrays(lambda part, label: answer(rng, label, 0.70)), "plain", seed=seed)
        decisions = arrays(lambda part, label: answer(rng, label, 0.72, taught_by[part], 0.3))
        write_run(tmp_path, decisions, "taught", seed=seed, experiment="distilled",
                  teacher="vit_tiny_patch16_224", distillation="hard", teacher_weights=str(teacher.model))
    return tmp_path


def test_on_several_seeds_of_cifar100_and_damaged_runs(cifar):
    """Numbers put in come out, superclasses are named, and what can't be read is said while the rest is
    drawn."""
    short, torn = (write_run(cifar, {}, seed=seed) for seed in (8, 9))
    (short.folder / "predictions.npz").unlink()
    (short.folder / "result.json").unlink()
    (torn.folder / "predictions.npz").write_bytes(b"PK\x03\x04")
    said, out = looked_at(cifar, reports=str(cifar / "runs"))
    assert f"{short.name} has no predictions.npz, for it was cut short" in said
    assert f"{torn.folder / 'predictions.npz'} is damaged" in said
    table = {name: pd.read_csv(out / "tables" / f"agreement_{name}.csv")
             for name in ("teacher", "classes", "noise", "disagreement")}
    assert len(table["classes"]) == 20 and "aquatic mammals" in set(table["classes"].superclass)
    sides = table["teacher"].set_index(["student", "part"])["there with the teacher (%)"]
    assert sides["taught", "test"] == pytest.approx(28 * 0.3, abs=1.5)
    assert sides["plain", "test"] < 1  # 28% wrong, 30% of them the teacher's
    gain = 2 + 28 * 0.3 * 0.84  # and what the teacher has right of the rest
    assert len(table["noise"]) == 3
    assert table["noise"]["difference (points)"].mean() == pytest.approx(gain, abs=1)
    # the teacher's error; one wrong draw in 100 is the label
    disagreement = table["disagreement"].set_index("different decisions (%)")
    assert disagreement.labels["teacher of taught"] == pytest.approx(15.8, abs=1.2)
    assert {path.stem for path in (out / "figures").glob("*.svg")} == set(FIGURES)


def test_gains_of_classes_are_differences_of_their_accuracies(tmp_path):
    class_gains, rng = definitions("a05_agreement").class_gains, np.random.default_rng(0)
    labels, taught = np.repeat(np.arange(10), 30), dict(experiment="distilled", teacher="resnet18")

    def written(name, decisions, label=labels, **fields):
        arrays = dict(test_image=np.arange(len(label)), test_label=label, test_class_decision=decisions,
                      test_class_confidence=np.ones(len(label), "float16"))
        return write_run(tmp_path / name, arrays, **fields)

    def pair(seed):
        decisions = [np.where(rng.random(300) < accuracy, labels, (labels + 1) % 10)
                     for accuracy in (0.8, 0.8 + 0.02 * labels)]
        plain = written("a", decisions[0], seed=seed)
        return decisions, (plain, written("a", decisions[1], seed=seed, **taught))
    drawn = [pair(seed) for seed in (11, 12, 13)]
    pairs, right = [runs for _, runs in drawn], np.array([decisions for decisions, _ in drawn]) == labels
    whole = class_gains(pairs, pd.Series("all", range(10))).loc["all"]
    accuracies = right.mean(-1)  # (pairs, plain and taught)
    assert whole[["gain", "low", "high"]].tolist() == pytest.approx(
        seed_interval(accuracies[:, 1] - accuracies[:, 0]))
    by_class = class_gains(pairs, pd.Series([*map(str, range(10))]))
    assert by_class.gain.mean() == pytest.approx(whole.gain)
    assert [by_class.plain["7"], by_class.taught["7"]] == pytest.approx(
        right[..., labels == 7].mean((0, 2)).tolist())
    for difference in by_class.won - by_class.lost, by_class.taught - by_class.plain:
        assert difference.tolist() == pytest.approx(by_class.gain.tolist())
    assert by_class.gain.is_monotonic_decreasing and by_class.images.eq(30).all()
    assert class_gains(pairs[:1], pd.Series([*map(str, range(10))])).low.isna().all()
    two = np.zeros(2, int)  # one won, one lost
    swap = written("b", [0, 1], two), written("b", [1, 0], two, **taught)
    zero = class_gains([swap], pd.Series(["zero"]))
    assert zero[["won", "lost", "gain"]].values.tolist() == [[0.5, 0.5, 0.0]]
