"""HiLo attention and LITv2 where a notebook's cell is too slow: precision, compiling, export, whole training
steps."""

import pandas as pd
import pytest
import timm
import torch
from timm.models.resnet import BasicBlock
from timm.models.resnetv2 import PreActBasic
from torch import nn

from conftest import ROOT, record
from test_notebooks import definitions, execute
from vitdistill.study.results import published
from vitdistill.bench.attention import case_costs, cases
from vitdistill.models.complexity import complexity, layers
from vitdistill.base import VitdistillError, shipped
from vitdistill.config import Config, preset
from vitdistill.launch.queue import grid_cells
from vitdistill.models.layers import DeformableMerging, LITv2
from vitdistill.launch.parts import config_of
from vitdistill.models.create import create, try_size  # and registers LITv2
from vitdistill.train.optimize import create_optimizer
from vitdistill.train.ranks import Ranks
from vitdistill.train.setup import prepare
from vitdistill.launch.studies import read_study
from vitdistill.runs import find_runs

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, NO_GPU])
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])


def tiny(**given):
    """Three stages as litv2_cifar has, 60 times smaller; offsets as after some training."""
    torch.manual_seed(0)
    small = dict(img_size=32, patch_size=2, num_classes=5, embed_dim=16, depths=(1, 1, 1),
                 num_heads=(2, 4, 8), windows=(0, 2, 1), alpha=0.5)
    model = LITv2(**small | given)
    for merging in (module for module in model.modules() if isinstance(module, DeformableMerging)):
        nn.init.normal_(merging.offset.weight, std=0.05)
    return model


TWO_STAGES = dict(depths=(1, 1), num_heads=(2, 4), windows=(0, 2))


def images(batch=4, side=32):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@DEVICES
def test_autocast_merges_in_full_precision(device):
    """Linear layers compute in bf16, offsets and merging in fp32; logits are those of fp32 to bf16's
    digits."""
    model, x = tiny().to(device).eval(), images().to(device)
    found = {"offset": set(), "merged": set(), "fc1": set()}
    for name, module in model.named_modules():
        kinds = found.get("merged" if isinstance(module, torch.nn.BatchNorm2d) else name.rpartition(".")[2])
        if kinds is not None:
            module.register_forward_hook(lambda _, inputs, output, kinds=kinds: kinds.add(output.dtype))
    with torch.no_grad():
        exact = model(x)
        assert {kind for kinds in found.values() for kind in kinds} == {torch.float32}
        with torch.autocast(device, torch.bfloat16):
            rough = model(x)
    full = {torch.float32}
    assert found == {"offset": full, "merged": full, "fc1": {torch.float32, torch.bfloat16}}
    assert 0 < (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()


@DEVICES
def test_a_step_under_autocast_moves_everything(device):
    """Each parameter gets a finite gradient that is not zero, offsets too, and it is close to fp32's."""
    gradients = []
    for enabled in (False, True):
        model = tiny().to(device).train()
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            loss = nn.functional.cross_entropy(model(images().to(device)), torch.arange(4, device=device))
        loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_compiles_without_a_break():
    """Two stages in one graph, forward and backward, with the numbers of eager mode (without inductor)."""
    eager, compiled = (tiny(**TWO_STAGES).train() for _ in "ab")
    whole = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for model, run in ((eager, eager), (compiled, whole)):
        run(images()).square().sum().backward()
    for one, other in zip(eager.parameters(), compiled.parameters()):
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@DEVICES
def test_compiled_network_computes_the_same(device):
    """By inductor, whose kernels round in another order; under autocast too."""
    model = tiny(**TWO_STAGES).to(device).eval()
    whole = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(whole(images().to(device)), model(images().to(device)), atol=1e-4)
        with torch.autocast(device, torch.bfloat16):
            assert torch.allclose(whole(images().to(device)), model(images().to(device)), atol=0.05)


def test_exports_for_any_batch():
    """torch.export, with the batch left open; the saved program gives the same logits."""
    model = tiny().eval()
    program = torch.export.export(model, (images(),), dynamic_shapes=(({0: torch.export.Dim.DYNAMIC}),))
    for batch in (2, 6):
        with torch.no_grad():
            assert torch.allclose(program.module()(images(batch)), model(images(batch)), atol=1e-5)


def test_channels_last_and_odd_maps_change_nothing():
    model = tiny(windows=(0, 3, 2)).eval()
    x = images(2, 40)  # maps of 20, 10 and 5: a window of 3 pads the second, one of 2 the third
    with torch.no_grad():
        plain = model(x)
        assert model.forward_features(x).shape == (2, 5, 5, 64)
        last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(last, plain, atol=1e-5)


@pytest.mark.parametrize("given, words", [
    (dict(num_heads=[3, 0, 12]), "0 heads do not divide 192 channels"),
    (dict(alhpa=0.5), "takes no such argument or value"),
    (dict(windows=[0, 2.5, 1]), "a window has a side of 2.5 tokens: choose a whole number"),
])
def test_a_wrong_argument_is_one_sentence(given, words):
    with pytest.raises(VitdistillError, match=words) as refused:
        create("litv2_cifar", 10, 32, **given)
    assert "\n" not in str(refused.value)


def test_a_window_larger_than_the_map_is_one_sentence():
    """Where a run tries the model at its size, so before anything is written; and of one that is made
    otherwise."""
    given = dict(windows=[0, 8, 1], depths=[1, 1, 1], embed_dim=24)
    with pytest.raises(VitdistillError, match="images of 16 px .*8 x 8 tokens .* map of 4"):
        try_size(create("litv2_cifar", 10, 16, **given), "litv2_cifar", 16)
    assert create("litv2_cifar", 10, 32, **given)(images(side=32)).shape == (4, 10)
    with pytest.raises(VitdistillError, match="not take images of 16 px"):
        prepare(Config(dataset="digits", student="litv2_cifar", student_kwargs=given, test_size=16), Ranks())
    with pytest.raises(VitdistillError, match="8 x 8 tokens .* 4 x 4: take"):
        timm.create_model("litv2_cifar", **given)(images(side=16))


def test_it_learns():
    """A few steps on eight images: the loss falls, and offsets that began at zero move, by a hundredth as
    fast."""
    torch.manual_seed(0)
    stages = dict(depths=(1, 1, 1), num_heads=(2, 4, 8), windows=(0, 2, 1))
    model = LITv2(32, 2, num_classes=8, embed_dim=24, **stages)
    x = images(8)
    y = torch.arange(8)
    optimizer = create_optimizer(Config(optimizer="adamw", lr=2e-3), model)
    losses = []
    for group in optimizer.param_groups:
        group["lr"] *= group.get("lr_scale", 1)  # as timm's schedule does
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step()
    merging = [module for module in model.modules() if isinstance(module, DeformableMerging)]
    moved = [module.offset.weight.detach().abs().max() for module in merging]
    assert losses[-1] < losses[0] / 2
    assert all(0 < shift <= 12 * 2e-5 * 1.01 for shift in moved)  # Adam's steps: about the learning rate


@pytest.mark.slow
@pytest.mark.parametrize("name", ["litv2_s", "litv2_m", "litv2_b"])
@DEVICES
def test_published_models_train_a_step(name, device):
    """At 224 px and the paper's stochastic depth, in bf16 where a GPU is: finite gradients, and nearly all
    move."""
    torch.manual_seed(0)
    model = timm.create_model(name).to(device).train()
    optimizer = create_optimizer(Config(optimizer="adamw", lr=1e-3), model)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        loss = nn.functional.cross_entropy(model(images(4, 224).to(device)), torch.arange(4, device=device))
    loss.backward()
    optimizer.step()
    assert abs(loss.item() - 6.9) < 0.7  # ln 1000: it knows nothing yet
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert sum(not torch.equal(p, old) for p, old in zip(model.parameters(), before)) > 0.95 * len(before)


def made_up(folder, slower=()):
    """A record of the attention bench in which time is multiply-adds, three times that for some
    contenders."""
    turns = case_costs(cases((224, 1024), (0.0, 0.9)))
    turns = turns[(turns.study != "networks") | (turns["size"] == 224)]
    factor = turns.contender.isin(slower) * 2 + 1
    seconds = turns.multiply_adds / 1e10 * factor
    turns = turns.assign(batch=1, seconds=seconds, memory_mb=5.0, machine="a machine")
    folder.mkdir()
    rounds = pd.concat([turns.assign(round=n, seconds=turns.seconds * (1 + n / 100)) for n in range(6)])
    rounds.to_csv(folder / "one.csv", index=False)


@pytest.mark.slow
def test_notebook_says_how_fast_attention_is(tmp_path):
    """Where time is multiply-adds HiLo is as much faster as it has fewer; else a third of that."""
    made_up(tmp_path / "bench", slower=["HiLo, alpha 0.5"])
    execute("a07_hilo", tmp_path / "a07.ipynb", bench=str(tmp_path / "bench"), out=str(tmp_path / "out"))
    speedup = pd.read_csv(tmp_path / "out/tables/hilo_speedup.csv").set_index(["contender", "image (px)"])
    faster = speedup["faster (times)"]
    assert [round(faster[f"HiLo, alpha {alpha}", 1024], 2) for alpha in (0.5, 0.9)] == [1.56, 3.66]
    assert (tmp_path / "out/figures/hilo_attention.svg").is_file()


def asked(*names):
    """What small_litv2's studies train, of each by the end of its name."""
    return [cell for name in names for cell in grid_cells(f"small_litv2{name}")]


def test_litv2_stands_beside_a_transformer_of_equal_cost():
    """In multiply-adds, within 3%: the two students, at each rate that is tried, and the two teachers."""
    transformer = "deit_tiny_patch16_224"
    equal = [cell.fields["student_kwargs"] for cell in asked("_rates", "", "_teachers")
             if cell.fields.get("student") == transformer]
    assert all(given == equal[0] for given in equal)
    litv2, deit = (complexity(name, 32, **given).multiply_adds.sum() for name, given in
                   (("litv2_cifar", {}), (transformer, equal[0])))
    assert deit == pytest.approx(litv2, rel=0.03)


def test_the_study_of_alpha_has_the_published_accuracies():
    """By the share of Lo-Fi heads that they were published for."""
    known = published(shipped("reports/reference/litv2.csv"))
    known = known[known["where"] == "effect of alpha on LITv2-S"].set_index("item").value.astype(float)
    study = read_study("small_litv2_alpha")
    assert study.published == pytest.approx({f"share {item}": value / 100 for item, value in known.items()})
    assert all(float(arm.split()[-1]) == part["student_kwargs"]["alpha"] for arm, part in study.arms.items())


@pytest.mark.slow
def test_notebook_compares_teachers_with_the_plain_student(tmp_path):
    """A teacher below the plain ResNet has a row that says so, though it taught none."""
    where = dict(runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"))
    for cell, right in zip(asked("_teachers"), (0.6, 0.3)):
        record(config_of(cell.part, cell.fields | where), cell.arm, test_top1=right)
    for seed in (1, 2):
        plain = preset("small", "baseline", t_max=0, lr=0.02, seed=seed, **where)
        record(plain, "small_tuned/plain", test_top1=0.35)
    for run in find_runs(ROOT / "reports/runs"):
        if any(arm.startswith("small_litv2_alpha/") for arm in run.arms):
            (tmp_path / "runs" / run.name).symlink_to(run.folder)
    execute("a07_hilo", tmp_path / "a07.ipynb", out=str(tmp_path / "out"), reports=str(tmp_path / "runs"))
    rows = pd.read_csv(tmp_path / "out/tables/hilo_students.csv").set_index(["arm", "other"]).difference
    differences = {("LITv2", "plain ResNet-18"): 0.25, ("DeiT", "plain ResNet-18"): -0.05}
    assert rows.to_dict() == pytest.approx(differences)


def test_a_resnet34_whose_further_blocks_are_zero_is_a_resnet18():
    """A deeper network can emulate a shallower one, as He et al. argue: each further block adds nothing."""
    torch.manual_seed(0)
    deep, shallow = (timm.create_model(name, num_classes=10, zero_init_last=False).eval()
                     for name in ("resnet34", "resnet18"))
    deep.load_state_dict(shallow.state_dict(), strict=False)
    with torch.no_grad():
        assert not torch.allclose(deep(images()), shallow(images()))
    further = set(dict(deep.named_modules())) - set(dict(shallow.named_modules()))
    for name in further:
        if name.endswith("bn2"):  # the last layer of a block's branch
            nn.init.zeros_(deep.get_submodule(name).weight)
    with torch.no_grad():
        assert torch.equal(deep(images()), shallow(images()))


def test_only_a_block_with_norm_and_relu_inside_can_be_the_identity():
    """Where ReLU follows the sum, no weights let a negative number through."""
    x = torch.randn(2, 32, 6, 6, generator=torch.Generator().manual_seed(1))
    for block, same in ((PreActBasic(32), True), (BasicBlock(32, 32), False)):
        for weight in block.parameters():
            nn.init.zeros_(weight)
        with torch.no_grad():
            assert torch.equal(block.eval()(x), x if same else x.relu())


def test_flops_are_those_that_litv2_published():
    """In billions, of ImageNet's models; a little more than the products that torch counts."""
    flops = definitions("a07_hilo").published_flops

    def made(name, classes, size):
        with torch.device("meta"):
            return create(name, classes, size)
    giga = [round(flops(made(f"litv2_{name}", 1000, 224), 224) / 1e9, 2) for name in "smb"]
    assert giga == [3.73, 7.48, 13.19]
    assert round(flops(made("litv2_b", 1000, 384), 384) / 1e9, 1) == 39.7
    for name, classes, size in ("litv2_s", 1000, 224), ("litv2_cifar", 100, 32):
        model = made(name, classes, size)
        products = layers(model, (3, size, size)).multiply_adds.sum()
        assert 0.002 < 1 - products / flops(model, size) < 0.005
