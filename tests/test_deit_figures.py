"""DeiT's figures and tables, of records that are made up here."""
import re

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from conftest import ROOT, TINY, record
from test_notebooks import definitions, execute
from safetensors.torch import save_file

from vitdistill.config import Config
from vitdistill.runs import find_runs
from vitdistill.launch.studies import Study, read_study, wanted_of
from vitdistill.study.compare import Comparison

ONE, TWO = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
TAUGHT = dict(experiment="deit", teacher="regnety_002", distillation="hard")


def decide(seed, right):
    """Decisions on 360 test images, so many of them right."""
    rng, label = np.random.default_rng(seed), np.arange(360) % 10
    return np.where(rng.random(360) < right, label, (label + 1) % 10)


def finished_run(root, top1, *arms, result=(), **over):
    """A finished run of these arms, with answers that are right as often as said."""
    c = Config(**dict(dataset="digits", student=TWO, student_kwargs=TINY, runs_dir=str(root / "runs"),
                      work_dir=str(root / "work"), experiment="baseline") | over)
    heads = ("class", "distillation", "softmax", "logits") if c.student == TWO else ("class",)
    run = record(c, *arms, metrics=pd.DataFrame(dict(epoch=[c.epochs - 1], test_top1=top1)),
                 **dict(test_top1=top1, heads=dict.fromkeys(heads, top1)) | dict(result))
    arrays = {f"test_{head}_decision": decide([c.seed, len(head)], top1) for head in heads}
    arrays |= {f"test_{head}_confidence": np.full(360, 0.9, np.float16) for head in heads}
    run.save_predictions(test_image=np.arange(360), test_label=np.arange(360) % 10, **arrays)
    return run


def given_by_study(full, file="", **varied):
    """The fields that a study's file gives for 'study/arm', with these of the values that it varies."""
    study, _, arm = full.partition("/")
    each = [wanted.given for wanted in wanted_of(read_study(str(file or study)), arm)]
    return next(given for given in each if all(given[key] == value for key, value in varied.items()))


def tables(root, **parameters):
    """Runs the notebook on the records; returns a function that reads a table, by arm."""
    (root / "runs").mkdir(exist_ok=True)
    execute("a06_deit", root / "a06.ipynb", reports=str(root / "runs"), out=str(root / "out"), **parameters)
    return lambda name, index="arm": pd.read_csv(root / f"out/tables/deit_{name}.csv").set_index(index)


def test_figures_of_made_up_records(tmp_path):
    """Figure 1 of published numbers, Figure 3 of lengths, Table 4's heat map, and the claims."""
    weights = "../shared/data/weights/mobilenetv2_100.in1k.safetensors"
    teacher = finished_run(tmp_path, 0.95, "deit_teacher/MobileNetV2", experiment="teacher", seed=2,
                           student="mobilenetv2_100", student_kwargs={}, student_weights=weights)
    named = TAUGHT | dict(teacher_weights=str(teacher.model))
    for study, seed, epochs in (("lengths", 1, 16), ("table3", 1, 32), ("table3", 2, 32), ("lengths", 1, 64),
                                ("fresh", 4, 32), ("fresh", 5, 32)):
        plain, token = f"deit_{study}/plain", f"deit_{study}/hard, token"
        varied = dict(epochs=epochs) if study == "lengths" else {}
        given = dict(epochs=epochs, seed=seed) | given_by_study(plain, **varied)
        taught = TAUGHT if study == "fresh" else named  # which trains a teacher of its own
        finished_run(tmp_path, 0.5 + epochs / 1000, plain, **given)
        finished_run(tmp_path, 0.5 + seed * epochs / 500, token, **taught | given)
    table = tables(tmp_path)
    drawn = {path.stem for path in (tmp_path / "out/figures").glob("*.svg") if path.stat().st_size > 10_000}
    names = "claims", "disagreement", "throughput", "lengths", "positions"
    assert drawn == {f"deit_{name}" for name in names}
    shares = table("disagreement", "answer")
    assert list(shares) == ["label", "teacher", "labels alone", "class", "distillation", "softmax"]
    assert (shares.loc["teacher"].iloc[2:] > 0.1).all()
    assert table("epochs").epochs.tolist() == [16, 64, 16, 64, 32, 32]


@pytest.mark.slow
def test_weights_without_position_embeddings_are_one_sentence(tmp_path):
    (tmp_path / "runs").mkdir()
    save_file(dict(weight=torch.ones(1)), tmp_path / "other.safetensors")
    with pytest.raises(papermill.PapermillExecutionError, match="14 x 14 patches: name the weights"):
        execute("a06_deit", tmp_path / "a06.ipynb", reports=str(tmp_path / "runs"), out=str(tmp_path / "out"),
                bench=str(tmp_path / "bench"), trained_positions=str(tmp_path / "other.safetensors"))
    assert not (tmp_path / "bench/positions.csv").exists()


@pytest.mark.slow
def test_figures_that_are_measured(tmp_path):
    """Asked to measure, it times Figure 1's models here; of named weights it tells how position embeddings
    shorten."""
    (tmp_path / "runs").mkdir()
    save_file(dict(pos_embed=torch.ones(1, 2 + 14 * 14, 8)), tmp_path / "alike.safetensors")
    execute("a06_deit", tmp_path / "a06.ipynb", reports=str(tmp_path / "runs"), out=str(tmp_path / "out"),
            bench=str(tmp_path / "bench"), measure=True, batch=1, passes=1,
            trained_positions=str(tmp_path / "alike.safetensors"))
    positions = pd.read_csv(tmp_path / "bench/positions.csv").set_index("positions")
    assert set(positions.index) == {"alike"} and (positions[["bicubic", "bilinear"]] == 1).all(axis=None)
    paces = pd.read_csv(tmp_path / "bench/paces.csv").set_index("model")
    told = pd.read_csv(tmp_path / "out/tables/deit_cost.csv").set_index("model")
    assert (paces.images_per_second > 0).all() and paces.machine.nunique() == 1 and set(paces.images) == {1}
    assert told["images a second"].to_dict() == paces.images_per_second.to_dict()
    assert paces.machine.iloc[0] in (tmp_path / "out/figures/deit_throughput.svg").read_text()


def test_what_held_out_images_chose(tmp_path):
    """The arms that chose a recipe or a rate are shown by held-out images alone; Table 8 has the average of
    weights."""
    for lr, rate, held_out in (0.0005, 0.001, 0.41), (0.00025, 0.0003, 0.43):
        weak = given_by_study("deit_strengths/weak", lr=lr)
        finished_run(tmp_path, 0.48, "deit_strengths/weak", result=dict(val_top1=held_out),
                     **dict(student=ONE, seed=1) | weak)
        for arm, top1, epochs in ("transferred", 0.9, 4), ("from scratch", 0.8, 5):
            best = rate == 0.001
            given = dict(student=ONE, seed=1, epochs=epochs) | given_by_study(f"deit_transfer/{arm}", lr=rate)
            experiment = "finetune" if arm == "transferred" else "baseline"
            finished_run(tmp_path, top1 + 0.037 * best, f"deit_transfer/{arm}", experiment=experiment,
                         result=dict(val_top1=held_out), **given)
    for arm, top1 in ("plain", 0.5), ("SGD", 0.3), ("averaged weights", 0.5):
        given = dict(student=ONE, seed=1, optimizer="adamw") | given_by_study(f"deit_table8/{arm}")
        finished_run(tmp_path, top1, f"deit_table8/{arm}", result=dict(ema_test_top1=0.52), **given)
    table = tables(tmp_path)
    chosen = table("choices").chosen
    best = ["weak lr=0.00025", "transferred lr=0.0003", "from scratch lr=0.0003"]
    assert [*chosen.index[chosen == "yes"]] == best
    top1 = table("transfer").top1.dropna().to_dict()
    assert top1 == {"transferred lr=0.0003": 0.9, "from scratch lr=0.0003": 0.8}
    changed = table("one_changed")
    assert changed.difference.to_dict() == pytest.approx({"SGD": -0.2, "averaged weights": 0.02}, abs=0.05)
    assert changed.change["SGD"].startswith("optimizer=sgd, lr=0.05")
    assert changed.low["SGD"] < -0.2 < changed.high["SGD"]
    assert changed.difference["averaged weights"] == pytest.approx(0.02)
    shown = "".join(path.read_text() for path in (tmp_path / "out/tables").glob("*.md"))
    assert "0.48" not in shown and "0.937" not in shown


def test_a_users_own_study(tmp_path):
    """Of a copy of nbs/studies/deit_own.yaml: differences beside the published ones, heads, tokens and
    choices."""
    file = tmp_path / "mine.yaml"
    file.write_text((ROOT / "nbs/studies/deit_own.yaml").read_text() + "choose: {by: val_top1}\n")
    teacher = finished_run(tmp_path, 0.9, "mine/convnet", experiment="deit_teacher",
                           **given_by_study("mine/convnet", file))
    named = TAUGHT | dict(teacher_weights=str(teacher.model))
    one = named | dict(student=ONE, experiment="distilled")
    soft = dict(distillation="soft", alpha=0.1)
    arms = dict(plain=(0.50, dict(student=ONE)), hard=(0.56, one), soft=(0.53, one | soft))
    arms |= {"two class tokens": (0.51, {}), "hard, token": (0.57, named)}
    arms["soft, token"] = 0.55, named | soft
    for seed in 1, 2, 3:
        for arm, (top1, more) in arms.items():
            more = more | dict(result=dict(val_top1=top1, token_cosines=[0.1, 0.5, 0.6 + 0.1 * seed]))
            given = given_by_study(f"mine/{arm}", file)
            finished_run(tmp_path, top1 + 0.001 * seed * len(arm), f"mine/{arm}", seed=seed, **more | given)
    table = tables(tmp_path, study=str(file))
    claims = table("claims", "what")
    assert claims.difference["hard labels"] == pytest.approx(0.06 - 0.002)
    assert claims.difference["hard labels and a token"] == pytest.approx(0.07 + 0.012)
    assert claims.published["a token for hard labels"] == pytest.approx(0.004)
    assert table("methods").class_top1.count() == 3 and table("heads").loc["soft, token"].top1.nunique() == 1
    tokens = table("tokens")
    assert tokens["block 2"]["hard, token"] == pytest.approx(0.8)
    assert tokens.published.dropna().tolist() == [0.06, 0.93, 0.999]
    assert table("choices").chosen["hard, token"] == "yes"


def test_runs_without_a_study(tmp_path):
    """Runs of docs/recipes.md name no study: their accuracies stand beside the published ones."""
    for seed in 1, 2:
        finished_run(tmp_path, 0.6, seed=seed, **TAUGHT)
    finished_run(tmp_path, 0.5, student=ONE)
    table = tables(tmp_path)
    methods = table("methods")
    assert methods.seeds[methods.seeds > 0].tolist() == [1] * 3 and methods.published["hard"] == 0.83
    assert table("heads").seeds.tolist() == [1] * 8
    for name in "transfer", "resolution", "one_changed", "epochs", "choices":  # missing: how to make it
        command = re.search(r"not run: vitdistill grid (\w+)", table(name).index[0])
        assert (ROOT / f"nbs/studies/{command[1]}.yaml").is_file()


NOTEBOOK = definitions("a06_deit", "HEADS")


def arms_of(**arms):
    return Comparison(Study("mine", arms=dict.fromkeys(arms, {})), arms)


def two_heads(top1):
    return dict(heads={"class": top1 - 0.03, "distillation": top1 - 0.01, "softmax": top1, "logits": top1})


def decided(root, decisions, seed=1, **over):
    """A finished run with these decisions, by head, on test images of class 0."""
    c = Config(dataset="digits", student=TWO, seed=seed, runs_dir=str(root), **over)
    run = record(c, test_top1=0.7)
    n = len(next(iter(decisions.values())))
    arrays = {f"test_{head}_decision": np.array(of) for head, of in decisions.items()}
    arrays |= {f"test_{head}_confidence": np.ones(n, "float16") for head in decisions}
    run.save_predictions(test_image=np.arange(n), test_label=np.zeros(n, int), **arrays)
    return run


def test_rows_of_heads_and_tokens(tmp_path):
    """Means over seeds; equal arms once; one head has no row, nor older records a cosine."""
    token = [finished_run(tmp_path, top1, result=two_heads(top1), seed=seed, **TAUGHT)
             for seed, top1 in ((1, 0.7), (2, 0.74))]
    alone = [finished_run(tmp_path, 0.6, student=ONE)]
    mine = arms_of(plain=alone, token=token)
    again = arms_of(again=token)
    rows = NOTEBOOK.head_rows([mine, again]).set_index("head")
    assert [*rows.index] == [*NOTEBOOK.HEADS.values()]
    assert np.isnan(rows.low["softmaxes added"])  # all differ alike
    assert rows.top1.tolist() == pytest.approx([0.69, 0.71, 0.72, 0.72])
    assert rows.difference["softmaxes added"] == pytest.approx(0.03)
    assert not len(NOTEBOOK.head_rows([arms_of(plain=alone)])) and not len(NOTEBOOK.token_rows([mine]))
    measured = [finished_run(tmp_path, 0.7, result=dict(token_cosines=[0.1, 0.4, last]), seed=seed, **TAUGHT)
                for seed, last in ((3, 0.8), (4, 0.9))]
    row, = NOTEBOOK.token_rows([arms_of(token=[*measured, *token], plain=alone)]).to_dict("records")
    assert (row["arm"], row["seeds"]) == ("token", 2)
    assert [row[f"block {n}"] for n in range(3)] == pytest.approx([0.1, 0.4, 0.85])
    table = NOTEBOOK.accuracies([mine, again, arms_of(soon=[])]).set_index("arm")
    assert [*table.index] == ["plain", "token", "soon"]
    assert table.distillation_top1["token"] == pytest.approx(0.71)
    assert np.isnan(table.distillation_top1["plain"]) and np.isnan(table.top1["soon"])


def test_deits_of_no_study_are_found(tmp_path):
    hard = [finished_run(tmp_path, 0.7, seed=seed, **TAUGHT) for seed in (1, 2)]
    finished_run(tmp_path, 0.7, student="resnet18", student_kwargs={})
    finished_run(tmp_path, 0.7, "mine/token", seed=3, **TAUGHT)
    found = NOTEBOOK.without_study(find_runs(tmp_path / "runs")).accuracies()
    assert found[["arm", "seeds"]].values.tolist() == [[run.name, 1] for run in hard]


def test_who_decides_alike(tmp_path):
    """Table 4 by hand: four images, two seeds; a plain student of each seed, or none."""
    teacher = decided(tmp_path / "teacher", {"class": [0, 0, 0, 0]})
    first = {"class": [0, 0, 1, 1], "distillation": [0, 0, 0, 1], "softmax": [0, 0, 0, 1]}
    students = [decided(tmp_path, given, seed, **TAUGHT) for seed, given in
                ((1, first), (2, first | {"class": [0, 0, 0, 1]}))]
    shares = NOTEBOOK.head_disagreement(students, {1: teacher, 2: teacher})
    assert [*shares] == ["label", "teacher", "class", "distillation", "softmax"]
    assert shares.teacher.tolist() == pytest.approx([0, 0, 0.375, 0.25, 0.25])
    assert shares["class"]["distillation"] == 0.125 and shares.equals(shares.T)
    plain = [decided(tmp_path / "plain", {"class": [1, 1, 1, 1]}, seed) for seed in (1, 2)]
    assert NOTEBOOK.head_disagreement(students, {1: teacher}, plain[:1]).shape == (4, 4)  # seed 2 has none
    both = NOTEBOOK.head_disagreement(students, plain=plain)
    assert both["labels alone"].tolist() == pytest.approx([1, 0, 0.625, 0.75, 0.75])


def test_fields_recipes_and_sizes(tmp_path):
    """Only what differs; a size by hand: embedding, tokens, layers, norm and head."""
    deep = finished_run(tmp_path, 0.5, seed=2, lr=0.3, student_kwargs=dict(depth=2, drop_path_rate=0.1))
    shallow = finished_run(tmp_path, 0.5, student_kwargs=dict(depth=1))
    fields = NOTEBOOK.differing_fields(dict(plain=[shallow], deep=[deep], soon=[]))
    assert fields.lr.to_dict() == dict(plain=Config().lr, deep=0.3)
    assert {*fields} == {"lr", "student_kwargs.depth", "student_kwargs.drop_path_rate"}
    recipes = dict(recipe=("recipe", "baseline"), demo=("demo", "deit"))
    table = NOTEBOOK.recipe_rows(recipes).set_index("field")
    assert table.loc["mixup"].tolist() == ["0.8", "0.0"] and table.recipe["label_smoothing"] == "0.1"
    assert "temperature" not in table.index and "seed" not in table.index  # the default in both
    row = NOTEBOOK.variant_rows(ONE).iloc[0]
    width, tokens = 192, 14 * 14 + 1
    attention, perceptron = 4 * width * (width + 1), 2 * 4 * width * width + 5 * width
    layer = attention + perceptron + 2 * 2 * width  # norms
    patches, head = 3 * 16 * 16 * width + width, 1000 * (width + 1)
    by_hand = patches + width + tokens * width + 12 * layer + 2 * width + head
    assert row[["width", "heads", "layers", "parameters"]].tolist() == [width, 3, 12, by_hand]
