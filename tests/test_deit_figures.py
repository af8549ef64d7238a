"""DeiT's figures, drawn of records that are made up here."""
import json
import os
import re
import shlex

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY
from safetensors.torch import save_file

from forked_notebooks import analyse
from vitdistill.analysis import repeats
from vitdistill.cli import configured, field_values
from vitdistill.config import Config, VitdistillError, config_hash, preset, run_name, save
from vitdistill.runs import Run, find_runs
from vitdistill.tables import again, weights_maker
from vitdistill.teachers import is_answers

TAUGHT = dict(experiment="deit", teacher="regnety_002", distillation="hard", teacher_weights="out/{}/model")


def decide(seed, right):
    """Decisions on 360 test images, so many of them right."""
    rng, label = np.random.default_rng(seed), np.arange(360) % 10
    return np.where(rng.random(360) < right, label, (label + 1) % 10)


def record(root, top1, heads=("class", "distillation", "softmax"), val_top1=None, cosines=None, **over):
    """A finished run, whose answers are right as often as said, and its predictions."""
    c = Config(**dict(dataset="digits", student="deit_tiny_distilled_patch16_224", student_kwargs=TINY,
                      work_dir=str(root / "work"), experiment="baseline") | over)
    folder = root / "runs" / run_name(c)
    save(c, folder / "config.yaml")
    (folder / "metrics.csv").write_text(f"epoch,test_top1\n{c.epochs - 1},{top1}\n")
    told = dict.fromkeys((*heads, "logits"), top1)
    result = dict(hash=config_hash(c), test_top1=top1, heads=told, teacher_top1=0.9 if c.teacher else None)
    result |= dict(val_top1=val_top1) if val_top1 else {}
    result |= dict(token_cosines=cosines) if cosines else {}
    (folder / "result.json").write_text(json.dumps(result))
    arrays = {f"test_{head}_decision": decide([c.seed, len(head)], top1) for head in heads}
    arrays |= {f"test_{head}_confidence": np.full(360, 0.9, np.float16) for head in heads}
    np.savez(folder / "predictions.npz", test_image=np.arange(360), test_label=np.arange(360) % 10, **arrays)
    return Run(folder)


@pytest.fixture
def records(tmp_path):
    """A teacher, and students of three lengths, taught and on labels alone, two seeds each."""
    teacher = record(tmp_path, 0.95, ("class",), student="regnety_002", student_kwargs={}, experiment="deit_teacher")
    taught = TAUGHT | dict(teacher_weights=TAUGHT["teacher_weights"].format(teacher.name))
    for seed in (1, 2):
        for epochs, plain, more in ((10, 0.5, 0.0), (20, 0.6, 0.1), (40, 0.62, 0.2)):
            record(tmp_path, plain + 0.01 * seed, seed=seed, epochs=epochs)
            record(tmp_path, plain + more + 0.01 * seed, seed=seed, epochs=epochs, **taught)
    return tmp_path


def test_figures_of_made_up_records(records):
    """Figure 1 of published numbers, Figure 3 of lengths, Table 4's heat map; no record has cosines to draw."""
    analyse("a06_deit", records / "a06.ipynb", reports=str(records / "runs"), out=str(records / "out"))
    drawn = {path.stem for path in (records / "out/figures").glob("*.svg") if path.stat().st_size > 10_000}
    assert drawn == {f"deit_{name}" for name in ("heads", "disagreement", "throughput", "lengths", "positions")}
    shares = pd.read_csv(records / "out/tables/deit_disagreement.csv").set_index("answer")
    assert shares.pop("reproduce").str.fullmatch(r"vitdistill train .* && for seed in 1 2; do vitdistill .*").all()
    assert list(shares) == ["label", "teacher", "class", "distillation", "softmax"]
    assert (shares.loc["teacher"][2:] > 0.1).all()
    rows = pd.read_csv(records / "out/tables/deit_methods.csv").query("row == 'measured'")  # the rest is published
    named = rows.reproduce.str.extract(r"--config (\S+)")[0]
    assert all(map(os.path.isfile, named)) and len(rows) == 6  # each from its record
    table = pd.read_csv(records / "out/tables/deit_variants.csv").set_index("model")
    assert table.parameters.tolist() == [5_717_416, 22_050_664, 86_567_656]
    assert table["published parameters (M)"].tolist() == [5, 22, 86] and table.heads.tolist() == [3, 6, 12]
    assert (table.parameters / 1e6 - table["published parameters (M)"]).abs().max() < 1


@pytest.mark.slow
def test_weights_without_position_embeddings_are_one_sentence(tmp_path):
    (tmp_path / "runs").mkdir()
    save_file(dict(weight=torch.ones(1)), tmp_path / "other.safetensors")
    with pytest.raises(VitdistillError, match="holds no position embeddings of 14 x 14 patches: name the weights"):
        analyse("a06_deit", tmp_path / "a06.ipynb", reports=str(tmp_path / "runs"), out=str(tmp_path / "out"),
                bench=str(tmp_path / "bench"), trained_positions=str(tmp_path / "other.safetensors"))
    assert not (tmp_path / "bench/positions.csv").exists()


@pytest.mark.slow
def test_figures_that_are_measured(tmp_path):
    """Asked to measure, it times Figure 1's models here; of named weights it tells how position embeddings shorten."""
    (tmp_path / "runs").mkdir()
    save_file(dict(pos_embed=torch.ones(1, 2 + 14 * 14, 8)), tmp_path / "alike.safetensors")
    analyse("a06_deit", tmp_path / "a06.ipynb", reports=str(tmp_path / "runs"), out=str(tmp_path / "out"),
            bench=str(tmp_path / "bench"), measure=True, batch=1, passes=1,
            trained_positions=str(tmp_path / "alike.safetensors"))
    positions = pd.read_csv(tmp_path / "bench/positions.csv").set_index("positions")
    assert set(positions.index) == {"alike"} and (positions[["bicubic", "bilinear"]] == 1).all(axis=None)
    paces = pd.read_csv(tmp_path / "bench/paces.csv").set_index("model")
    told = pd.read_csv(tmp_path / "out/tables/deit_cost.csv").set_index("model")
    assert (paces.images_per_second > 0).all() and paces.machine.nunique() == 1 and set(paces.images) == {1}
    assert told["images a second"].to_dict() == paces.images_per_second.to_dict() and len(told) == 18
    assert paces.machine.iloc[0] in (tmp_path / "out/figures/deit_throughput.svg").read_text()


def test_tokens_are_drawn_of_records(tmp_path):
    """A line an arm of those records that tell cosines, the published ones beside them; two class tokens: control."""
    for seed in (1, 2):
        record(tmp_path, 0.6, seed=seed, **TAUGHT, cosines=[0.1, 0.5, 0.8 + 0.1 * seed])
        record(tmp_path, 0.5, seed=seed, cosines=[0.0, 0.9, 0.99])
    record(tmp_path, 0.6, seed=3, **TAUGHT)  # an older record
    analyse("a06_deit", tmp_path / "a06.ipynb", reports=str(tmp_path / "runs"), out=str(tmp_path / "out"))
    table = pd.read_csv(tmp_path / "out/tables/deit_tokens.csv")
    measured = table[table.row == "measured"].set_index("arm")
    assert measured["last"].to_dict() == pytest.approx({"taught by regnety_002": 0.95, "control, labels alone": 0.99})
    assert table.published.dropna().tolist() == [0.06, 0.93, 0.999] and set(measured.seeds) == {2}
    drawn = (tmp_path / "out/figures/deit_cosines.svg").read_text()
    assert all(arm in drawn for arm in measured.index)


def test_tables_of_one_recipe(tmp_path):
    """What a recipe was chosen by, and Table 8's arms, are not told among the ways of teaching; soft is no Table 2."""
    recipe = dict(student="deit_tiny_patch16_224", mixup=0.2, cutmix=0.5, lr=0.001, optimizer="adamw")
    record(tmp_path, 0.50, ("class",), **recipe)
    for lr, held_out in (0.001, 0.41), (0.002, 0.43):  # what chose the rate
        record(tmp_path, 0.48, ("class",), **recipe | dict(val_rows="0:99", lr=lr), val_top1=held_out)
    record(tmp_path, 0.40, ("class",), **recipe | dict(mixup=0.0, cutmix=0.0))
    record(tmp_path, 0.30, ("class",), **recipe | dict(optimizer="sgd", lr=0.05))
    two = TAUGHT | recipe | dict(student="deit_tiny_distilled_patch16_224", token="distillation")
    record(tmp_path, 0.6, **two)
    record(tmp_path, 0.7, **two | dict(distillation="soft", alpha=0.1))
    other = dict(student="deit_tiny_patch16_224", dataset="cifar10")
    on = dict(student_weights="out/work/x/model", weights_hash="1a2b", student_head="new", experiment="finetune")
    for top1, more in (0.9, on), (0.8, {}), (0.85, dict(epochs=99)):  # transferred, from scratch, and for longer
        record(tmp_path, top1, ("class",), **other | more)
    analyse("a06_deit", tmp_path / "a06.ipynb", reports=str(tmp_path / "runs"), out=str(tmp_path / "out"))

    def table(name):
        rows = pd.read_csv(tmp_path / f"out/tables/deit_{name}.csv")
        return rows[rows.row == "measured"] if "row" in rows else rows  # the rest is published

    assert table("teachers").top1.tolist() == [0.6]
    assert table("methods")[["distillation", "top1"]].values.tolist() == [["soft", 0.7], ["hard", 0.6], ["none", 0.5]]
    assert table("methods").alpha.isna().tolist() == [False, False, True]
    assert table("epochs").top1.tolist() == [0.7, 0.6, 0.5] and table("epochs").alpha.notna().any()
    assert table("one_changed").field.tolist() == ["lr, optimizer", "cutmix, mixup"]
    assert table("heads").distillation.tolist() == ["hard"] * 4 + ["soft"] * 4
    transfer = table("transfer")
    assert transfer[["weights", "top1"]].values.tolist() == [["trained", 0.9], ["random", 0.8]]
    choices = table("choices")
    assert choices[["lr", "held_out_top1", "chosen"]].values.tolist() == [[0.002, 0.43, "yes"], [0.001, 0.41, "no"]]
    told = "".join(path.read_text() for path in (tmp_path / "out/tables").glob("*.md"))
    assert "top1" not in choices and "0.48" not in told  # what chose is told on no test image


def test_claims_are_differences_of_arms(tmp_path):
    """Table 3's arms, two seeds: what each claim adds, beside what was published; the picture has a row each."""
    plain = dict(student="deit_tiny_patch16_224", mixup=0.2)
    one, two = plain | TAUGHT, plain | TAUGHT | dict(student="deit_tiny_distilled_patch16_224", token="distillation")
    arms = (0.50, plain), (0.56, one), (0.53, one | dict(distillation="soft", alpha=0.1)), (0.57, two), \
           (0.54, two | dict(teacher="resnet18")), (0.51, plain | dict(student=two["student"]))
    for seed in 1, 2, 3:
        for top1, arm in arms:
            record(tmp_path, top1 + 0.001 * seed * len(arm), seed=seed, **arm)
    analyse("a06_deit", tmp_path / "a06.ipynb", reports=str(tmp_path / "runs"), out=str(tmp_path / "out"))
    claims = pd.read_csv(tmp_path / "out/tables/deit_claims.csv").set_index("what")
    assert claims.difference["hard labels"] == pytest.approx(0.06 + 0.002 * (len(one) - len(plain)))
    assert claims.difference["hard labels and a token"] == pytest.approx(0.07 + 0.002 * (len(two) - len(plain)))
    assert claims.published["a token of its own for hard labels"] == pytest.approx(0.4)
    assert "regnety_002 instead of resnet18 as teacher" in claims.index and len(claims) == 8
    drawn = (tmp_path / "out/figures/deit_claims.svg").read_text()
    assert all(what in drawn for what in claims.index)


def test_commands_that_train_again_find_their_weights():
    """All weights that a recorded run's command names are beside the data, or a command before has written them."""
    for run in find_runs():
        if not weights_maker(run, "teacher"):
            continue
        written = {""}
        for part in again([run]).split(" && "):
            words = shlex.split(part)
            if words[0] == "papermill":  # e04: a teacher that was adopted
                given = dict(zip(words[words.index("."):][2::3], words[words.index("."):][3::3]))
                written.add(f"{given['work_dir']}/{given['adopted']}/model")
                continue
            given, source = field_values(words[2:])
            config = configured(source, given)
            named = {getattr(config, f"{role}_weights") for role in ("student", "teacher", "fold")}
            made = {path for path in named if not path.startswith("$VITDISTILL_DATA/weights/")}
            assert {path for path in made if not (is_answers(path) and (ROOT / path).is_file())} <= written
            written.add(f"{config.work_dir}/{run_name(config)}/model")  # its name holds the hashes of its files
        assert run_name(config) == run.name and config.runs_dir == "out/again"


def test_an_arms_command_trains_its_seeds():
    """The loop over seeds makes the very runs of the row, by name, from the first one's config."""
    arms = [arm for arm in repeats(find_runs()) if len(arm) > 1 and arm[0].config.student.startswith("deit")]
    assert len(arms) > 3
    for arm in arms:
        loop = re.fullmatch(r"for seed in ([\d ]+); do (.*) --seed \$seed; done", again(arm).split(" && ")[-1])
        words = shlex.split(loop[2])[2:]
        made = [configured(*reversed(field_values([*words, "--seed", seed]))) for seed in loop[1].split()]
        if not weights_maker(arm[0], "teacher") or is_answers(arm[0].config.teacher_weights):
            assert [run_name(config) for config in made] == [run.name for run in arm]
        assert [config.seed for config in made] == [run.config.seed for run in arm]


def test_every_row_of_the_committed_tables_has_its_command():
    """Measured, published or counted; no word stands for what a reader must find, but a file that no record knows."""
    files = sorted((ROOT / "reports/tables").glob("deit_*.csv"))
    assert len(files) > 12
    for file in files:
        commands = pd.read_csv(file).reproduce
        assert commands.notna().all(), file.name
        words = set(re.findall(r"(?<![$/.\w])[A-Z_]{3,}\b", " ".join(commands)))
        assert words <= {"FILE"} and not commands.str.contains("measure True(?! -p bench out/)").any(), file.name


def test_commands_of_rows_end_where_they_are_read(tmp_path):
    """What a row says to run makes a run of reports/runs, where the next look finds it, or is a grid that is there."""
    (tmp_path / "runs").mkdir()
    analyse("a06_deit", tmp_path / "a06.ipynb", reports=str(tmp_path / "runs"), out=str(tmp_path / "out"))
    for name in ("transfer", "resolution", "one_changed", "methods"):
        words = pd.read_csv(tmp_path / f"out/tables/deit_{name}.csv").reproduce[0].split()
        if "papermill" not in words:
            assert (ROOT / words[-1]).is_file()
            continue
        given = dict(zip(words[words.index("."):][2::3], words[words.index("."):][3::3]))
        role = given.pop("role", "deit")
        assert preset(given.pop("preset", "demo"), role, **given).runs_dir == Config().runs_dir
