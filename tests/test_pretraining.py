"""Pre-training by the same road: ranks, kills, papermill; its encoder is fine-tuned and teaches."""
import subprocess
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import papermill
import pytest
import safetensors.torch
import torch

from conftest import ROOT, assert_same, elsewhere, environment, on_ranks, processes_mentioning, run_of
from conftest import record, train_command, wait_until
from test_notebooks import definitions, execute, said
from vitdistill.base import VitdistillError
from vitdistill.config import Config, field_names, preset, save
from vitdistill.launch.queue import grid_cells
from vitdistill.losses import criterion
from vitdistill.models.create import create_student
from vitdistill.train.optimize import create_optimizer
from vitdistill.train.ranks import Ranks
from vitdistill.runs import find_runs
from vitdistill.train.setup import resolve
from vitdistill.launch.studies import read_study
from vitdistill.tasks.can import PRETRAINING
from vitdistill.tasks.table import EVERY_OBJECTIVE
from vitdistill.train.step import create_step
from vitdistill.train.loop import batches, train, train_epoch

SMALL = dict(projector=[32, 16], decoder=[32, 1, 2], colour_jitter=0.4)
EXPERIMENTS = ROOT / "nbs/experiments"


@pytest.fixture
def can(tiny):
    """A tiny transformer that is pre-trained on a fifth of the digits."""
    alone = {name: getattr(Config(), name) for name in field_names(group="teacher")}
    return replace(tiny, **alone, experiment="pretrain", distillation="can", objective_kwargs=SMALL,
                   opt_kwargs=dict(betas=[0.9, 0.95]), evaluate_every=3)


def test_a_step_sees_two_views_and_no_label(can):
    """Both views of an image are in its step, differ, and are those of any number of ranks; labels change
    nothing."""
    setup = PRETRAINING.prepare(resolve(can), Ranks())
    batch = next(batches(setup, 0))
    first, second = batch.pixels.chunk(2)
    assert batch.image.shape == (64,) and first.shape == second.shape and not first.equal(second)
    drawn = setup.criterion.draw(batch)
    for rank in range(2):
        half = next(batches(replace(setup, ranks=Ranks(rank, 2)), 0))
        where = np.flatnonzero(np.isin(batch.image, half.image))
        assert half.image.equal(batch.image[where]) and half.pixels.chunk(2)[1].equal(second[where])
        assert setup.criterion.draw(half).hidden.chunk(2)[1].equal(drawn.hidden.chunk(2)[1][where])
    out = setup.criterion.objective(setup.student, setup.criterion)(batch)
    objective = setup.criterion.objective(setup.student, setup.criterion)
    again = objective(batch._replace(targets=batch.targets * 0))
    assert out.loss.equal(again.loss)


def test_projector_and_decoder_learn(can):
    """A public implementation leaves them out of the optimizer; here every part moves, but positions and the
    head."""
    setup = PRETRAINING.prepare(resolve(replace(can, objective_kwargs=SMALL | dict(sigma=1.0))), Ranks())
    optimizer = create_optimizer(setup.config, setup.student.model, setup.criterion)
    parts = {**dict(setup.student.named_parameters()), **dict(setup.criterion.named_parameters())}
    before = {name: p.detach().clone() for name, p in parts.items()}
    silent = type("Silent", (), {"step": lambda *_: None, "teacher": lambda *_: None})()
    step = create_step(setup, setup.criterion.objective(setup.student, setup.criterion), optimizer)
    row = train_epoch(step, 0, silent)
    still = {name for name, p in parts.items() if p.equal(before[name])}
    assert still == {"model.pos_embed", "model.head.weight", "model.head.bias"}
    assert {name for name in row if name.startswith("train_")} == {
        "train_loss", "train_contrast", "train_reconstruction", "train_denoising"}
    weights = dict(contrast=0.03, reconstruction=0.67, denoising=0.3)
    total = sum(weight * row[f"train_{name}"] for name, weight in weights.items())
    assert row["train_loss"] == pytest.approx(total, rel=1e-4)


def test_strong_noise_is_found(can, tmp_path):
    """Where it weighs alone and is as strong as the pixels, its prediction errs less than none at all."""
    noise = dict(SMALL, sigma=2.0, weights=[0.0, 0.0, 1.0], decoder=[64, 1, 2])
    patches = can.student_kwargs | dict(patch_size=4)
    short = replace(can, runs_dir=str(tmp_path), work_dir=str(tmp_path), student_kwargs=patches,
                    batch_size=16, objective_kwargs=noise, epochs=6, evaluate_every=6, lr=3e-3)
    run = train(short, task=PRETRAINING)
    assert definitions("a08_can").noise_explained(run) > 0.1


@pytest.mark.slow
def test_ranks_give_the_same(can, tmp_path):
    """The contrast is taken of the whole batch, with gradients: 1, 2 and 4 ranks train alike, the last batch
    of two."""
    config = replace(can, batch_size=51, objective_kwargs=SMALL | dict(weights=[0.5, 0.4, 0.1], sigma=1.0))
    one, *others = on_ranks(config, tmp_path, 1, 2, 4)
    assert one.metrics().train_loss.iloc[-1] < one.metrics().train_loss.iloc[0] - 0.01
    weights = [safetensors.torch.load_file(run.model / "model.safetensors") for run in (one, *others)]
    for other, state in zip(others, weights[1:]):
        for name in ("train_loss", "train_contrast"):
            pd.testing.assert_series_equal(other.metrics()[name], one.metrics()[name], rtol=0, atol=1e-4)
        assert all((state[k] - weights[0][k]).abs().max() < 1e-3 for k in state)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_pretraining_ends_as_one_left_alone(can, tmp_path, ranks):
    """SIGKILL in mid-epoch; started again it leaves the same record, encoder, projector and decoder, bit for
    bit."""
    config = replace(can, epochs=8, batch_size=16, ema_decay=0.9, evaluate_every=4)
    alone = elsewhere(config, tmp_path / "alone")
    cut = elsewhere(config, tmp_path / "cut")

    def start(config, file):
        return subprocess.Popen(train_command(save(config, file), ranks), env=environment(),
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(alone, tmp_path / "alone.yaml").wait(180) == 0
    process = start(cut, tmp_path / "cut.yaml")
    assert wait_until(lambda: run_of(cut).folder.exists() and run_of(cut).epochs_done >= 3, 120)
    time.sleep(np.random.default_rng(0).uniform(0, 0.2))
    process.kill()
    process.wait()
    file = str(tmp_path / "cut.yaml")
    assert wait_until(lambda: not processes_mentioning(file), 30)  # ranks end with their launcher
    assert run_of(cut).status == "interrupted"
    assert start(cut, tmp_path / "cut.yaml").wait(180) == 0
    one, two = run_of(alone), run_of(cut)
    assert_same(one, two)
    assert len(two.metrics()) == 8
    assert one.result["ema_linear_test_top1"] > 0.2
    assert one.result["encoder_hash"] == two.result["encoder_hash"]
    states = [run.checkpoint()["criterion"] for run in (one, two)]
    assert states[0] and all(states[0][name].equal(states[1][name]) for name in states[0])
    pictures = [np.load(run.folder / "reconstructions.npz") for run in (one, two)]
    assert all(np.array_equal(pictures[0][name], pictures[1][name]) for name in ("clean", "seen", "filled"))


def test_encoder_is_one_graph(can):
    """The patches that are kept reach timm's forward pass under torch.compile too, another choice each
    time."""
    setup = PRETRAINING.prepare(resolve(can), Ranks())
    whole = torch.compile(setup.student, backend="eager", fullgraph=True, dynamic=False)
    for batch in (next(batches(setup, epoch)) for epoch in range(2)):
        drawn = setup.criterion.draw(batch)
        encoded = setup.student(drawn.pixels, drawn.keep)
        assert torch.allclose(whole(drawn.pixels, drawn.keep), encoded, atol=1e-6)


@pytest.mark.parametrize("change, ranks, words", [
    (dict(objective_kwargs=dict(mask=None)), 1, "{'mask': None} has a value of a type"),
    (dict(objective_kwargs=dict(views=2.0)), 1, "views = 2.0: give 1 or 2"),
    (dict(objective_kwargs=dict(weights="abc")), 1, "{'weights': 'abc'} has a value of a type"),
    (dict(batch_size=1), 2, "batches of 1 are fewer than 2 images a rank"),
    (dict(student="resnet18", student_kwargs={}), 1, "resnet18 has no patches to hide: pre-train"),
    (dict(mixup=0.8), 1, "mixup = 0.8 (group augmentation): leave it out"),
])
def test_bad_input_is_a_sentence(can, change, ranks, words):
    with pytest.raises(VitdistillError) as said:
        PRETRAINING.refuse_foreign(config := resolve(replace(can, **change)))
        PRETRAINING.prepare(config, Ranks(0, ranks))
    assert words in str(said.value) and "\n" not in str(said.value)


@pytest.mark.parametrize("name", ["can", "can_demo"])
def test_presets_can_be_prepared(name, tmp_path):
    """Every part is a config, and the fine-tuned model is the pre-trained one: e00 and e02 take what e06
    leaves."""
    parts = {part: preset(name, part) for part in ("pretrain", "teacher", "baseline", "distilled")}
    same = "student", "student_kwargs", "dataset", "data_fraction"
    assert all(getattr(parts["pretrain"], field) == getattr(parts["teacher"], field) for field in same)
    assert parts["distilled"].teacher_kwargs == parts["teacher"].student_kwargs
    assert parts["distilled"].teacher == parts["teacher"].student
    of_teacher = "teacher", "teacher_kwargs", "teacher_size", "distillation"
    untaught = {field: getattr(Config(), field) for field in of_teacher}
    assert replace(parts["distilled"], **untaught, experiment="baseline") == parts["baseline"]


def configs(*studies):
    """'study/arm', seed -> config, of all that these studies train."""
    return {(cell.arm, cell.seed): cell.config for name in studies for cell in grid_cells(name)}


def test_pretraining_has_the_published_betas():
    """AdamW's (.9, .95), in every group of the optimizer that training makes; fine-tuning has the usual
    ones."""
    for part, betas in ("pretrain", (0.9, 0.95)), ("teacher", (0.9, 0.999)):
        config = preset("can", part)
        model = create_student(config, 100, 32)
        terms = criterion(config, EVERY_OBJECTIVE)
        if part == "pretrain":
            terms.fit(model)
        optimizer = create_optimizer(config, model.model, terms)
        assert isinstance(optimizer, torch.optim.AdamW)
        assert {tuple(group["betas"]) for group in optimizer.param_groups} == {betas}


def probes(value):
    return dict(linear_val_top1=value - 0.05, linear_test_top1=value, knn_val_top1=0.1, knn_test_top1=0.1)


@pytest.fixture
def made_up(tmp_path):
    """Runs of CAN's studies: probes worse from arm to arm, 0.4 once fine-tuned, from scratch 0.25 and
    more."""
    where = {key: str(tmp_path / key[:4]) for key in ("runs_dir", "work_dir")}
    for (arm, seed), config in configs("can_pretrain", "can_seeds", "can_scratch").items():
        pretrains = config.experiment == "pretrain"
        model = f"{arm.removesuffix(' fine-tuned')} {seed}"  # by which a student's encoder is known
        begun = model if arm.endswith("fine-tuned") else ""
        top1 = 0.4 if begun else 0.25 + config.epochs / 1000
        place = [*read_study(arm.partition("/")[0]).arms].index(arm.partition("/")[2])
        record(replace(config, weights_hash=begun, **where), arm, seconds=60.0,
               **(dict(encoder_hash=model) | probes(0.3 - place / 100) if pretrains
                  else dict(held_out_top1=0.5, test_top1=top1)))
    return where


def test_analysis_compares_arms_of_its_studies(made_up, tmp_path):
    """On test images, by seed; a run of no arm is listed and compared with none; teachers beside their
    students."""
    mine = record(Config(**made_up, dataset="digits", experiment="pretrain", distillation="can",
                         student="vit_tiny_patch16_224"), seconds=60.0, **probes(0.9)).name
    teacher, = (run for run in find_runs(made_up["runs_dir"]) if "can_pretrain/CAN fine-tuned" in run.arms)
    answers = dict(distillation="hard", teacher="vit_tiny_patch16_224", teacher_weights=str(teacher.model))
    for seed in 1, 2:
        plain = preset("can", "baseline", **made_up, seed=seed)
        taught = preset("can", "distilled", **answers, **made_up, seed=seed)
        record(plain, "can_students/plain", seconds=60.0, test_top1=0.41)
        record(taught, "can_students/taught by CAN's model", seconds=60.0, test_top1=0.4 + seed / 50)
    execute("a08_can", tmp_path / "a08.ipynb", students="can_students", reports=made_up["runs_dir"],
            out=str(tmp_path / "out"))

    def table(name):
        index = ["arm", "other"] if name in compared else ["arm"]
        return pd.read_csv(tmp_path / f"out/tables/can_{name}.csv").set_index(index)
    compared = "differences", "tuned", "students"
    steps, costs, arms, tuned, students = map(table, ("differences", "cost", "arms", "tuned", "students"))
    simclr = np.mean([0.01, -0.01, -0.01])  # of the seeds, by the places of their arms in the studies
    assert steps.loc[("CAN", "SimCLR"), ["difference", "held_out"]].tolist() == pytest.approx([simclr] * 2)
    assert steps.difference["CAN", "no noise"] == pytest.approx(0.09)
    assert steps.seeds["CAN", "hardly trained"] == 1
    assert steps.difference["CAN", "noise as augmentation only"] == pytest.approx(0.07)  # the decisive one
    assert (costs["hours over CAN"] == 1).all() and costs["published over CAN"]["SimCLR"] == 1.7
    assert costs.seeds[["CAN", "SimCLR", "MAE", "no noise"]].tolist() == [3, 3, 3, 1]
    assert costs.loc[["SimCLR", "MAE"], "multiply-adds over CAN"].between(0.5, 1.7).all()
    assert arms["fine-tuned, test"]["CAN"].startswith("0.4 ±") and arms["linear probe, test"][mine] == "0.9"
    scratch = arms.loc[["from scratch, 20 epochs", "from scratch, 80 epochs"]]
    assert scratch["fine-tuned, test"].str[:4].tolist() == ["0.27", "0.33"]
    assert scratch.seeds.tolist() == [3, 1]
    assert tuned.seeds["CAN", "from scratch, 20 epochs"] == 3
    assert tuned.difference["CAN", "from scratch, 80 epochs"] == pytest.approx(0.07)
    drawing = (tmp_path / "out/figures/can_arms.svg").read_text()
    assert all(f"from scratch, {n} epochs" in drawing for n in (20, 80))
    row = students.loc[("taught by CAN's model", "plain")]
    assert row[["seeds", "difference", "teacher_test"]].tolist() == pytest.approx([2, 0.02, 0.4])


def test_analysis_compares_the_arms_of_a_file_of_ones_own(made_up, tmp_path):
    one, = (run for run in find_runs(made_up["runs_dir"])
            if "can_seeds/CAN" in run.arms and run.config.seed == 2)
    file = tmp_path / "mine.yaml"
    file.write_text("measure: linear_test_top1\n"
                    f"arms: {{mine: {{runs: ['pretrain-*-s2-{one.name[-8:]}']}}, CAN: can_pretrain/CAN}}\n")
    execute("a08_can", tmp_path / "a08.ipynb", study=str(file), reports=made_up["runs_dir"],
            out=str(tmp_path / "out"))
    arms = pd.read_csv(tmp_path / "out/tables/can_arms.csv").set_index("arm")
    assert float(arms["linear probe, test"]["CAN"]) == 0.3 and arms.seeds["mine"] == 1
    assert not (tmp_path / "out/tables/can_differences.csv").exists()  # the file compares none


def test_notebook_pretrains_and_fine_tunes(tmp_path):
    """e06 in its own folder, as JupyterLab runs it: the probes, the fine-tuned model, its copy by a name."""
    vit = dict(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
    where = dict(runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"), device="cpu")
    notebook = execute("e06_pretrain", tmp_path / "e06.ipynb", cwd=EXPERIMENTS, student_kwargs=vit,
                       role="teacher", objective_kwargs=SMALL, epochs=1, data_fraction=0.1, adopted="mine",
                       **where)
    encoder, tuned = (next(run for run in find_runs(tmp_path / "runs") if run.config.experiment == name)
                      for name in ("pretrain", "teacher"))
    assert f"{encoder.result['linear_test_top1']:.1%} on test images" in said(notebook)
    held_out, test = tuned.result["held_out_top1"], tuned.result["test_top1"]
    accuracies = f"accuracy {held_out:.1%} on held-out images, {test:.1%} on test images"
    assert f"fine-tuned: {accuracies}" in said(notebook)
    assert tuned.config.weights_hash == encoder.result["encoder_hash"]
    assert (tmp_path / "work/mine/model").is_dir()


def test_a_role_that_cannot_follow_is_refused_at_once(tmp_path):
    """Of another student, before anything is trained."""
    where = dict(runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"))
    with pytest.raises(papermill.PapermillExecutionError, match="'baseline' trains a resnet50.* vit_tiny"):
        execute("e06_pretrain", tmp_path / "e06.ipynb", role="baseline", **where)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_chain_of_notebooks(tmp_path):
    """e06 on two ranks, fine-tuned there; e00 fine-tunes the same encoder; e02 learns from it; a08 shows all
    three."""
    where = dict(runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"), preset="can_demo",
                 device="cpu")
    vit = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, class_token=False,
               global_pool="avg", fc_norm=False)

    def ran(name, **parameters):
        return said(execute(name, tmp_path / f"{name}.ipynb", **parameters))

    shown = ran("e06_pretrain", student_kwargs=vit, objective_kwargs=SMALL, epochs=6, nproc=2, **where)
    encoder = next(run for run in find_runs(tmp_path / "runs"))
    assert "linear probe: " in shown and str(encoder.model) in shown
    assert "nproc-per-node 2" in encoder.environment["command"]
    shown = ran("e06_pretrain", student_kwargs=vit, objective_kwargs=SMALL, epochs=6, role="teacher",
                adopted="can-s1", **where)
    tuned = next(run for run in find_runs(tmp_path / "runs") if run.config.experiment == "teacher")
    assert "is done already" in shown and tuned.config.weights_hash == encoder.result["encoder_hash"]
    ran("e00_teacher", student_kwargs=vit, student_weights=str(encoder.model), epochs=3, **where)
    teachers = [run for run in find_runs(tmp_path / "runs") if run.config.experiment == "teacher"]
    assert len(teachers) == 2
    assert {run.config.weights_hash for run in teachers} == {encoder.result["encoder_hash"]}
    assert tuned.result["test_top1"] > 0.3
    ran("e02_distilled_resnet50", teacher_kwargs=vit, teacher_weights=str(tmp_path / "work/can-s1/model"),
            student="resnet18", epochs=1, **where)
    pupil = next(run for run in find_runs(tmp_path / "runs") if run.config.experiment == "distilled")
    one_image = 1 / 145  # of those held out: the pupil asks in the precision of this processor
    assert pupil.result["teacher_top1"] == pytest.approx(tuned.result["held_out_top1"], abs=1.01 * one_image)
    execute("a08_can", tmp_path / "a08.ipynb", reports=str(tmp_path / "runs"), out=str(tmp_path / "out"))
    assert (tmp_path / "out/figures/can_reconstructions.svg").stat().st_size > 5_000
    table = (tmp_path / "out/tables/can_arms.md").read_text()
    assert f"{encoder.result['linear_test_top1']:.4g}" in table and encoder.name in table
