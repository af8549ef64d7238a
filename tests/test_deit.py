"""DeiT's recipe whole: what goes together, what is refused, what its presets and grids are."""
import math
from dataclasses import replace
from unittest import mock

import pytest
import timm
import torch
import yaml
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from conftest import ROOT, TINY
from vitdistill.study.results import published
from vitdistill.data.augment import AUGMENTATIONS
from vitdistill.base import VitdistillError
from vitdistill.config import Config, config_hash, field_names, preset
from vitdistill.data.datasets import image_side
from vitdistill.data.split import split_rows
from vitdistill.launch.parts import PARTS
from vitdistill.launch.queue import grid_cells
from vitdistill.launch.runner import config_to_run
from vitdistill.models.create import create_student
from vitdistill.train.optimize import create_schedule
from vitdistill.train.ranks import Ranks
from vitdistill.runs import Run
from vitdistill.train.setup import prepare, resolve, student_logits
from vitdistill.study.compare import choices, load_comparison
from vitdistill.train.loop import batches

PRESETS = "deit", "deit3", "deit_finetune", "small_deit", "small_deit3", "small_deit_finetune"


STRENGTHS = *AUGMENTATIONS[1:], "mixup", "cutmix", "label_smoothing", "repeats"  # all but the crop


def parts_of(name):
    parts = yaml.safe_load((ROOT / f"nbs/presets/{name}.yaml").read_text())
    return {part for part in parts if part != "common"}


def students_of(name):
    return [preset(name, part) for part in sorted(parts_of(name) - {"deit_teacher"})]


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_students_are_trained_alike(name):
    """They are augmented and optimized by one recipe."""
    alike = ("optimizer lr weight_decay epochs batch_size randaugment mixup cutmix random_erasing repeats "
             "label_smoothing padding").split()
    assert len({tuple(getattr(student, field) for field in alike) for student in students_of(name)}) == 1


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_heads_fit_what_they_learn(name):
    """A distillation token goes with a student that has one, a teacher with hard labels."""
    for student in students_of(name):
        assert (student.token == "distillation") == ("distilled" in student.student)
        assert bool(student.teacher) == (student.distillation == "hard")


def test_small_finetuning_is_as_strong_as_the_training_before():
    before, after = (preset(name, "baseline") for name in ("small_deit", "small_deit_finetune"))
    assert all(getattr(before, field) == getattr(after, field) for field in (*STRENGTHS, "padding"))


@pytest.mark.parametrize("name", ["deit", "deit3", "deit_finetune"])
def test_large_presets_give_pixels_as_hub_checkpoints_expect(name):
    """ImageNet's constants, and images that are cropped by size; DeiT III's crop is the simple one."""
    cut = (0.0, 4) if name == "deit3" else (0.08, 0)
    students = students_of(name)
    assert {(its.student_normalization, its.resized_crop, its.padding) for its in students} == {("own", *cut)}
    models = [model for its in students for model in (its.student, its.teacher) if model]
    cfgs = map(timm.models.get_pretrained_cfg, models)
    assert {(cfg.mean, cfg.std) for cfg in cfgs} == {(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)}


@pytest.mark.parametrize("name", ["deit", "deit_finetune"])
def test_large_presets_teacher_is_the_public_codes(name):
    """By the file's name in its README."""
    teachers = {its.teacher for its in students_of(name) if its.teacher}
    files = {timm.models.get_pretrained_cfg(teacher).url.split("/")[-1] for teacher in teachers}
    assert files == {"regnety_160-a5fe301d.pth"}


def test_preset_deit_is_the_papers_table_9():
    """Its plain, its usual and its distilled student, field by field."""
    table = published().query("where == 'Table 9'").set_index("quantity").value
    for its in students_of("deit"):
        fields = vars(its) | its.student_kwargs
        augment = "rand-m{}-mstd{}-inc1".format(*table.randaugment.split("/"))
        said = {**table.drop("lr"), "randaugment": augment}
        assert its.lr == float(table.lr.split(" ")[0]) * its.batch_size / 512
        assert {name: type(fields[name])(value.lower()) for name, value in said.items()} == {
            name: fields[name] for name in said}


def test_preset_deit3_is_the_papers():
    """Section 3 of arXiv 2204.07118, and its public command for ImageNet-1k."""
    said = dict(epochs=800, batch_size=2048, optimizer="lamb", lr=3e-3, weight_decay=0.05, warmup_epochs=5,
                distillation="bce", label_smoothing=0.0, three_augment=True, color_jitter=0.3,
                random_erasing=0.0, mixup=0.8, cutmix=1.0, repeats=3, ema_decay=0.0,
                student_drop_path="constant", image_size=192)
    its = preset("deit3", "baseline")
    assert {name: getattr(its, name) for name in said} == said
    assert its.student_kwargs["init_values"] == 1e-4 and its.student_kwargs["drop_path_rate"] == 0.2


def test_the_small_recipe_is_what_held_out_images_chose():
    """Of what deit_strengths.yaml asks."""
    best = choices(load_comparison("deit_strengths")).query("chosen == 'yes'").runs.item()
    fields = {*field_names(group="data"), *field_names(group="optimization")}
    fields |= {"student_kwargs", "label_smoothing"}
    fields -= {"seed", *field_names(split=True)}
    recipe = {field: getattr(Run(ROOT / "reports/runs" / best).config, field) for field in fields}
    for student in students_of("small_deit"):
        assert recipe == {field: getattr(student, field) for field in recipe}


def test_deit3_can_be_evaluated_at_another_size():
    """As its head says: trained at 192 px, evaluated at 224."""
    sizes = dict(image_size=224, student_size=192, test_size=224)
    with torch.device("meta"):
        student = create_student(preset("deit3", "baseline", **sizes), 1000, 224).eval()
        logits = [student(torch.zeros(2, 3, side, side))[0] for side in (192, 224)]
    assert [tuple(its.shape) for its in logits] == [(2, 1000)] * 2


def test_stochastic_depth_of_presets():
    """DeiT III drops every branch alike; DeiT ever more over depth, and none of the first block; small ones
    none."""

    def rates(name, **over):
        with torch.device("meta"):
            model = create_student(preset(name, "baseline", **over), 1000, 224).model
        branches = [block for block in model.modules() if hasattr(block, "drop_path1")]
        assert len(branches) == len(model.blocks)
        return [getattr(part, "drop_prob", 0.0) for b in branches for part in (b.drop_path1, b.drop_path2)]

    assert rates("deit3", student_size=192) == pytest.approx([0.2] * 24)
    growing = [0.1 * block / 11 for block in range(12) for _ in range(2)]
    assert rates("deit") == pytest.approx(growing)
    for name in ("small_deit", "small_deit3"):
        assert rates(name, student_size=32) == [0.0] * 12
    assert preset("small_deit3", "baseline").student_drop_path == "constant"
    kwargs = preset("small_deit3", "baseline").student_kwargs | dict(drop_path_rate=0.1)
    assert rates("small_deit3", student_size=32, student_kwargs=kwargs) == pytest.approx([0.1] * 12)


@pytest.mark.parametrize("name", [
    "deit_strengths", "deit3_strengths", "deit_table2", "deit_table3", "deit_table8", "deit_lengths",
    "deit_resolution", "deit_transfer", "deit_gpu", "deit_gpu_strengths", "deit_gpu_parts"])
def test_studies_make_configs(name):
    """No two cells are the same run; strengths are chosen on held-out images; one factor changes at a
    time."""
    made = [replace(cell.config, **cell.models) for cell in grid_cells(ROOT / f"nbs/studies/{name}.yaml")]
    assert len(made) == len({str(config) for config in made})
    if "strengths" in name or name == "deit_resolution":  # chosen on held-out images, with as many steps
        assert {config.val_rows for config in made} == {"44000:50000"}
        labels = torch.arange(50_000) % 100
        images = {len(split_rows(labels, config)[0]) for config in made}
        assert images == {44_000 if "gpu" in name else 10_000}
    if "gpu" in name:  # Table 9 in full, the last of those to choose from
        full = vars(preset("deit", "baseline"))
        assert all(getattr(made[-1], field) == full[field] for field in STRENGTHS)
    if name == "deit_table2":  # the weakest teacher is trained first, also if all cells could start at once
        cells = grid_cells(ROOT / f"nbs/studies/{name}.yaml")
        assert [cell.part == "teacher" for cell in cells] == [True] + [False] * 9
    if name in ("deit_table8", "deit_gpu_parts"):  # one factor each; then other lengths
        first = made[0]
        changed = [[key for key in field_names(hashed=True) if getattr(config, key) != getattr(first, key)]
                   for config in made]
        together = {"mixup", "cutmix"}, {"optimizer", "lr", "weight_decay"}
        one_factor = [len(fields) == 1 or {*fields} in together for fields in changed[1:11]]
        assert not changed[0] and all(one_factor)  # the recipe, and what Table 8 tells
        assert all("epochs" in fields for fields in changed[11:])
        assert name != "deit_table8" or config_hash(made[0]) == config_hash(preset("small_deit", "baseline"))


@pytest.mark.parametrize("part", ["baseline", "deit"])
def test_the_students_first_weights_are_the_public_codes(part):
    """A truncated normal of deviation 0.02, no biases; and no dropout (arXiv 2012.12877, section 6 and Table
    9)."""
    model = create_student(preset("small_deit", part), 100, 32).model
    linear = [module for module in model.blocks.modules() if isinstance(module, torch.nn.Linear)]
    weights = torch.cat([module.weight.detach().flatten() for module in linear])
    assert len(linear) == 24 and weights.std() == pytest.approx(0.02, rel=0.02) and abs(weights.mean()) < 1e-3
    assert not any(module.bias.any() for module in linear)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} <= {0.0}


@pytest.mark.parametrize("preset_of, part", [("deit", "baseline"), ("deit", "deit"), ("deit3", "baseline")])
def test_tokens_and_positions_begin_as_the_public_codes(preset_of, part):
    """Truncated normals of deviation 0.02 (timm 0.3.2, which DeiT pins; models_v2.py), the class token's
    too."""
    recipe = preset(preset_of, part)
    small = recipe.student_kwargs | dict(img_size=224, depth=1)
    model = create_student(replace(recipe, student_kwargs=small), 10, 224).model
    drawn = [getattr(model, name, None) for name in ("cls_token", "dist_token", "pos_embed")]
    assert [tensor is not None for tensor in drawn] == [True, part == "deit", True]
    for tensor in (tensor for tensor in drawn if tensor is not None):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("part", ["baseline", "deit"])
def test_the_recipes_learning_rate_is_timms(part):
    """5e-4 x batch/512; five epochs from 1e-6, then a cosine to 1e-5, step by step and resumed.
    facebookresearch/deit has the same numbers an epoch later: its main.py steps the schedule after epoch 0
    with 0, and so on."""
    recipe = preset("deit", part)
    assert recipe.lr == 5e-4 * recipe.batch_size / 512
    for order in (range(300), (150, 3, 299, 5)):  # step by step, and as a run that is resumed there
        optimizer = torch.optim.SGD([torch.zeros(1)], recipe.lr)
        schedule = create_schedule(recipe, optimizer)
        for epoch in order:
            schedule.step(epoch)
            cosine = 1e-5 + (recipe.lr - 1e-5) * (1 + math.cos(math.pi * epoch / 300)) / 2
            expected = 1e-6 + (recipe.lr - 1e-6) * epoch / 5 if epoch < 5 else cosine
            assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9)


def test_training_at_one_size_and_evaluation_at_another():
    """Batches have the one side, what is evaluated the other: the same weights at that size say the same."""
    vit = dict(student="vit_tiny_patch16_224", student_kwargs=TINY | dict(dynamic_img_size=True))
    small = Config(dataset="digits", test_size=48, batch_size=64, compile="none", device="cpu",
                   precision="fp32", **vit)
    setup, rows = prepare(resolve(small), Ranks()), torch.arange(20)
    assert next(iter(batches(setup, 0))).pixels.shape[-1] == 32
    large = prepare(resolve(replace(small, test_size=0, student_size=48)), Ranks())
    large.student.load_state_dict(setup.student.state_dict())
    (at_48,), (expected,) = (student_logits(one, one.test_views, rows) for one in (setup, large))
    assert torch.allclose(at_48, expected, atol=1e-6)
    fixed = replace(small, student_kwargs=TINY)
    with pytest.raises(VitdistillError, match="32 px .* 48 px: .* dynamic_img_size to true"):
        prepare(resolve(fixed), Ranks())


def test_finetuning_follows_its_preset():
    """Sizes and stochastic depth are its; a larger student raises the teacher's size; what is given is
    taken."""
    def begun(**more):
        begin = dict(preset="small_deit_finetune", student_weights="a.pth", teacher_weights="b.pth")
        return config_to_run("finetune", PARTS["finetune"].values(begin | more))

    sizes = [begun().teacher_size, begun(student_size=192).teacher_size, begun(teacher_size=96).teacher_size]
    assert sizes == [160, 192, 96] and begun().student_size == 48
    large = begun(preset="deit_finetune", role="baseline", data_root="images")
    assert (large.student_size, image_side(large), large.student_kwargs) == (0, 384, {"drop_path_rate": 0.1})
    control = begun(distillation="none")
    assert not (control.teacher or control.teacher_weights) and control.student == begun().student
    for given in (dict(student="hf-hub:me/vit"), dict(preset="demo")):  # a name alone trains from scratch
        with mock.patch("vitdistill.launch.runner.with_teacher") as taught, \
                pytest.raises(VitdistillError, match="student_weights = None: name the student"):
            begun(student_weights=None, teacher_weights=None, **given)
        assert not taught.called  # at once, before a teacher is trained


def test_an_odd_batch_is_mixed_too(recipe):
    """timm refuses odd batches; here the image in the middle is mixed with itself, and its label stays
    whole."""
    alone = replace(recipe, batch_size=41, teacher="", distillation="none", teacher_kwargs={})
    setup = prepare(resolve(alone), Ranks())
    for batch in batches(setup, 0):
        assert torch.allclose(batch.targets.sum(1), torch.ones(len(batch.targets)))
        if len(batch.targets) % 2:
            assert batch.targets[len(batch.targets) // 2].max() == pytest.approx(1)
    assert setup.rows % 41  # the last one is short as well


@pytest.mark.parametrize("change, words", [
    (dict(student="vit_tiny_patch16_224", token="distillation"), ["'distillation'", "take one such as"]),
    (dict(token="class"), ["token = 'class'", "take the student without it"]),
])
def test_what_does_not_fit_is_one_sentence(recipe, change, words):
    with pytest.raises(VitdistillError) as said:
        prepare(resolve(replace(recipe, **change)), Ranks())
    text = str(said.value)
    assert all(word in text for word in words) and "\n" not in text
