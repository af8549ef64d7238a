"""A training step asks the device for few operators: each is a launch, 10 to 20 us of the host, and a GPU
waits for it. The measure is the loop of a textbook, counted in the same way. The device is `meta` here, so
that what runs on it is told from what the host computes for itself. The student (a compiled program, or a
graph), the optimizer (a fused kernel) and each function that is compiled count as one operator a pass: a
dispatch mode makes compiled functions run eagerly, so a stand-in is in the place of each."""
import linecache
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

import vitdistill
from vitdistill.train import step, loop as train
from vitdistill.teachers.answers import Answers, memo_key, open_memo
from vitdistill.config import Config
from vitdistill.data.unlabelled import Unlabelled
from vitdistill.bench.contenders import fill_randomly, random_data
from vitdistill.losses import OBJECTIVES, Batch, criterion
from vitdistill.models.create import create_student
from vitdistill.train.optimize import create_optimizer
from vitdistill.tasks.can import ContrastiveMaskedNoise
from vitdistill.train.ranks import Ranks
from vitdistill.train.setup import Setup, student_logits
from vitdistill.teachers.teacher import teacher_and_card
from vitdistill.data.views import Views

BATCH = 8
TEACHERS = {name: "vit_tiny_patch16_224" if made.wants else "" for name, made in OBJECTIVES.items()}
SMALL = dict(img_size=32, patch_size=16, embed_dim=12, depth=1, num_heads=3)
PACKAGE = str(Path(vitdistill.__file__).parent)
NO_LAUNCH = "aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::detach"


def place():
    """Where in the package an operator was asked for: module and function, in a training step the line."""
    frame = sys._getframe(2)
    while frame and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "elsewhere"
    name = f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_qualname}"
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return f"{name}: {line}" if name == "step.TrainingStep.__call__" else name


class Operators(TorchDispatchMode):
    """Counts, by place, operators on the device (`launches`) and those that the host runs (`host`); no
    views."""

    def __init__(self):
        super().__init__()
        self.launches, self.host, self.paused = Counter(), Counter(), False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if self.paused or function.is_view or function.name().partition(".")[0] in NO_LAUNCH:
            return out
        tensors = [x for x in _pytree.tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        counts = self.launches if any(x.is_meta for x in tensors) else self.host
        counts[place()] += 1
        return out

    @contextmanager
    def as_one(self, name):
        """What happens inside is one operator."""
        self.launches[name] += not self.paused
        before = self.paused
        self.paused = True
        try:
            yield
        finally:
            self.paused = before


def one_operator(counter, name, function):
    """A function of tensors to a tensor, whose call counts as one operator and whose backward pass as
    another."""

    class One(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            with counter.as_one(f"{name}, forward"), torch.enable_grad():
                ctx.inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
                ctx.output = function(*ctx.inputs)
                return ctx.output.detach()

        @staticmethod
        def backward(ctx, gradient):
            with counter.as_one(f"{name}, backward"):
                trained = [x for x in ctx.inputs if x.requires_grad]
                gradients = iter(torch.autograd.grad(ctx.output, trained, gradient))
            return tuple(next(gradients) if x.requires_grad else None for x in ctx.inputs)

    return One.apply


def as_programs(counter):
    """In the place of `compiled`: functions that count as programs do. The student counts itself."""

    def compiled(function, mode):
        if mode == "none" or isinstance(function, Student):
            return function
        if isinstance(function, nn.Module):  # what a student is trained by, which has a backward pass too
            def loss_of(heads, batch):
                loss = one_operator(counter, "criterion", lambda *heads: function(heads, batch)[0])
                return loss(*heads), {}
            return loss_of

        def program(*arguments):
            with counter.as_one(function.__name__):
                return function(*arguments)
        return program

    return compiled


class Student(nn.Module):
    """A student of one operator a pass; its logits are bf16, as under autocast."""

    def __init__(self, counter, classes):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, device="meta"))
        self.run = one_operator(counter, "student", self.logits)

    @staticmethod
    def logits(pixels, weight):
        return (pixels.mean((1, 2, 3))[:, None] * weight).bfloat16()

    def forward(self, pixels):
        return (self.run(pixels, self.weight),)


class Optimizer:
    """One that is fused: an operator a step."""

    def __init__(self, counter, student):
        self.counter = counter
        self.student = student
        self.param_groups = [dict(lr=0.1)]

    def step(self):
        with self.counter.as_one("optimizer"):
            pass

    def zero_grad(self, set_to_none=True):
        self.student.weight.grad = None


class Silent:
    """Who watches the progress."""

    def step(self, images):
        pass

    def teacher(self, done, total):
        pass


def epoch(taught, folder, steps, mode):
    """The operators of an epoch of so many steps, by place."""
    data = random_data(BATCH * steps)
    place = "meta"
    counter = Operators()
    name = "hard" if taught else "none"
    config = Config(dataset="cifar100", distillation=name, val_fraction=0.0, batch_size=BATCH, compile=mode,
                    teacher=TEACHERS[name], teacher_kwargs=SMALL, teacher_size=32, device="cpu",
                    precision="fp32", teacher_precision="fp32")
    student = Student(counter, len(data.classes))
    views = Views(data.train_images, config.padding, place)
    answers = None
    if taught:
        teacher, _ = teacher_and_card(config, data)
        memo = open_memo(folder / str(steps), memo_key(teacher, config, data))
        fill_randomly(memo)
        answers = Answers(teacher, views, memo=memo)
    setup = Setup(config=config, ranks=Ranks(device=place), data=data, student=student, views=views,
                  test_views=views, train_rows=torch.arange(BATCH * steps), val_rows=torch.arange(0),
                  criterion=criterion(config), answers=answers)
    with counter, pytest.MonkeyPatch.context() as patch:
        for module in (train, vitdistill.train.setup):
            patch.setattr(module, "compiled", as_programs(counter))
        objective = train.create_objective(student, setup.criterion, mode, setup.ranks)
        train.train_epoch(step.create_step(setup, objective, Optimizer(counter, student)), 0, Silent())
    assert counter.launches["student, forward"] == counter.launches["student, backward"] == steps
    return counter.launches, counter.host


def of_a_step(taught, folder, mode):
    """(launches, operators of the host) of a step, by place: what a longer epoch has more."""
    counts = []
    for short, long in zip(epoch(taught, folder, 2, mode), epoch(taught, folder, 6, mode)):
        a_step = Counter({place: (long[place] - short[place]) / 4 for place in long})
        counts.append(+a_step)
    return counts


def textbook_views(images, rows):
    """Crops and flips, drawn for each image, and normalized."""
    n, side, device = len(rows), images.shape[1], images.device
    dy, dx = torch.randint(9, (2, n, 1), device=device)
    y = dy + torch.arange(side, device=device)
    x = dx + torch.arange(side, device=device)
    padded = F.pad(images[rows], (0, 0, 4, 4, 4, 4))
    pixels = padded[torch.arange(n, device=device)[:, None, None], y[:, :, None], x[:, None, :]]
    flipped = torch.rand(n, 1, 1, 1, device=device) < 0.5
    pixels = torch.where(flipped, pixels.flip(2), pixels)
    return ((pixels / 255 - 0.5) / 0.2).permute(0, 3, 1, 2)


class TextbookLoss(nn.Module):
    """Cross-entropy of the labels, or its mean with that of the teacher's decisions."""

    def forward(self, heads, batch):
        [logits] = heads
        loss = F.cross_entropy(logits, batch.targets)
        if batch.answer is not None:
            loss = 0.5 * loss + 0.5 * F.cross_entropy(logits, batch.answer)
        return loss, {}


def of_a_textbook(taught, mode):
    """Launches of a step of a plain loop: no sums, no ranks, no memo."""
    counter = Operators()
    compiled = as_programs(counter)
    student = Student(counter, 100)
    optimizer = Optimizer(counter, student)
    views = compiled(textbook_views, mode)
    objective = compiled(TextbookLoss(), mode)
    images = torch.empty(64, 32, 32, 3, dtype=torch.uint8, device="meta")
    rows, labels, decisions = torch.zeros(3, BATCH, dtype=torch.int64, device="meta")
    with counter:
        heads = student(views(images, rows))
        loss, _ = objective(heads, Batch(None, labels, decisions if taught else None))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return counter.launches


@pytest.fixture
def no_numbers(monkeypatch):
    """A `Meter` that sums, and whose sums nobody reads: meta tensors hold none."""
    monkeypatch.setattr(step.Meter, "row", lambda self, *_: {})


def as_table(counts):
    return "\n".join(f"{n:6.2f}  {place}" for place, n in counts.most_common())


@pytest.mark.parametrize("mode", ["reduce-overhead", "none"])
@pytest.mark.parametrize("kind", ["plain", "taught"])
def test_operators_of_a_step(kind, mode, tmp_path, no_numbers):
    """At most twice the launches of a textbook's loop, and no small work of the host."""
    launches, host = of_a_step(kind == "taught", tmp_path, mode)
    plain = of_a_textbook(kind == "taught", mode)
    ratio = launches.total() / plain.total()
    assert ratio <= 2, f"{ratio:.2f} times a textbook's launches:\n{as_table(launches)}\n{as_table(plain)}"
    assert not host, as_table(host)


def textbook_drawing(image):
    """One view of an image, as torchvision crops and colours it, with noise and an order of its patches."""
    augment = v2.Compose([v2.RandomResizedCrop(32), v2.ColorJitter(0.4, 0.4, 0.4), v2.RandomGrayscale(1.0)])
    pixels = augment(image).float()
    noise = torch.rand((), device=image.device) * torch.randn_like(pixels)
    return pixels + noise, torch.rand(64, device=image.device).argsort()


def test_operators_of_what_pretraining_draws():
    """Crops, colours, masks and noise of both views, which no program holds: a third of the launches of a
    loop over images, at most, and nothing of the host."""
    pixels = torch.empty(2 * BATCH, 3, 32, 32, dtype=torch.uint8, device="meta")
    with Operators() as plain:
        for image in pixels:
            textbook_drawing(image)
    can = ContrastiveMaskedNoise(colour_jitter=0.4)
    can.patches = 64
    image = torch.empty(BATCH, dtype=torch.int64, device="meta")
    with Operators() as counter:
        can.draw(Batch(can.augment(pixels, image, 0), None, image=image))
    assert counter.launches.total() <= plain.launches.total() / 3, as_table(counter.launches)
    assert not counter.host, as_table(counter.host)


@pytest.mark.parametrize("name", [name for name, made in OBJECTIVES.items() if made.compiles])
def test_an_objective_is_one_program(name):
    """It is compiled once, whatever the epoch, without a break, and says what it says eagerly."""
    objective = criterion(Config(distillation=name, teacher=TEACHERS[name], epochs=1))
    g, programs = torch.Generator().manual_seed(0), []
    logits, teacher_logits = torch.randn(2, 16, 10, generator=g)
    answer = objective.wants.make(teacher_logits) if objective.wants else None
    batch = Batch(None, torch.randint(10, (16,), generator=g), answer)

    def note(graph, inputs):
        programs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    traced = torch.compile(objective, backend=note, fullgraph=True, dynamic=False)
    for number in range(3):
        heads = [logits.clone().requires_grad_() for _ in range(2)]
        for call, z in zip((objective, traced), heads):
            loss, _ = call((z,), batch._replace(epoch=number))
            loss.backward()
        assert heads[0].grad.equal(heads[1].grad) and heads[0].grad.any()
    assert len(programs) == 1


def test_one_operator_computes_what_it_stands_for():
    """Values and gradients are those of the function itself, and its two passes count as two."""
    x, w = torch.randn(3, 2), torch.randn(2, requires_grad=True)
    with Operators() as counter:
        one_operator(counter, "f", lambda x, w: (x * w).relu().sum())(x, w).backward()
    gradient, w.grad = w.grad, None
    (x * w).relu().sum().backward()
    assert gradient.equal(w.grad)
    assert counter.launches == {"f, forward": 1, "f, backward": 1}


class FromMemo:
    """A teacher's answers of a kind, as they come from a memo: on the CPU."""

    by_view = True

    def __init__(self, kind):
        self.kind = kind
        self.blank = kind.make(torch.zeros(1, 100))

    def __call__(self, plan, asked):
        return self.kind.make(torch.randn(len(plan.image), 100))


@pytest.mark.parametrize(("name", "images_on"), [*[(name, "cuda:0") for name in OBJECTIVES], ("hard", "cpu")])
def test_a_step_on_a_gpu_that_is_not_here(name, images_on, monkeypatch):
    """Fakes hold no numbers, but know their device: none meets one of another, and nothing needs a number."""
    mixes = dict(mixup=0.8, cutmix=1.0) if name == "none" else {}
    config = Config(dataset="cifar100", distillation=name, teacher=TEACHERS[name], val_fraction=0.0,
                    batch_size=BATCH, student="resnet10t", student_size=48, compile="none", **mixes)
    monkeypatch.setattr(train, "seed_step", lambda *_: None)  # there is no generator
    monkeypatch.setattr(train, "cut_ahead", lambda setup, cut, steps: map(cut, steps))  # no fakes in threads
    data = random_data(2 * BATCH + 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = torch.arange(len(data.train_labels))
        with torch.device("cuda:0"):
            student = create_student(config, 100, 32)
        views = Views(data.train_images, config.padding, images_on)
        own = criterion(config).to("cuda:0")
        setup = Setup(config=config, ranks=Ranks(device="cuda:0"), data=data, student=student, views=views,
                      test_views=views, train_rows=rows, val_rows=rows[:0], criterion=own,
                      answers=FromMemo(own.wants) if own.wants else None)
        assert create_optimizer(config, student.model).defaults["fused"]
        captured = replace(config, compile="graph", optimizer="adamw")  # its count is on the GPU
        assert create_optimizer(captured, student.model).defaults["capturable"]
        objective = train.create_objective(student, own, "none", setup.ranks)
        meter = step.Meter("cuda:0")
        for batch in train.batches(setup, 0):
            out = objective.train()(batch)
            meter.add(out, batch)
            assert batch.pixels.shape[1:] == (3, 48, 48)
            assert out.loss.device.type == batch.pixels.device.type == "cuda"
        assert meter.sums.device.type == meter.steps.device.type == "cuda"
        heads = student_logits(setup, views, rows)
    assert heads[0].shape == (len(rows), 100) and heads[0].device.type == "cuda"


def no_read(self, *_, **__):
    raise AssertionError("the host reads a tensor, and a graph can't hold that")


CAPTURED = [name for name in OBJECTIVES if OBJECTIVES[name].compiles]
PARTLY = [name for name in CAPTURED if OBJECTIVES[name].wants and not OBJECTIVES[name].needs_label]
CASES = [*[(name, "") for name in CAPTURED], *[(name, f"{BATCH}:{2 * BATCH}") for name in PARTLY]]


@pytest.mark.parametrize(("name", "unlabelled"), CASES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_captured_step_needs_no_host(name, unlabelled, optimizer, monkeypatch):
    """Views, normalization, both passes, clipping, optimizer and sums, where half of a batch has no labels
    too. Fakes raise where a number is read or a branch is taken on one."""
    config = Config(dataset="cifar100", distillation=name, teacher=TEACHERS[name], val_fraction=0.0,
                    batch_size=BATCH, student="resnet10t", compile="graph", optimizer=optimizer,
                    clip_grad=1.0, unlabelled=unlabelled)
    data, own = random_data(2 * BATCH), criterion(config)
    rows, others = torch.arange(2 * BATCH).split(BATCH)
    views = Views(data.train_images, config.padding)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with fakes:
        student = create_student(config, 100, 32)
    setup = Setup(config=config, ranks=Ranks(), data=data, student=student, views=views, test_views=views,
                  train_rows=rows, val_rows=rows[:0], criterion=own,
                  unlabelled=Unlabelled(unlabelled, others) if unlabelled else None,
                  answers=FromMemo(own.wants) if own.wants else None)
    batch = next(train.batches(setup, 0))
    assert batch.pixels.shape == (2, BATCH)  # rows and views: the step cuts them
    assert (batch.targets < 0).sum() == (BATCH // 2 if unlabelled else 0)
    with fakes:
        batch = _pytree.tree_map_only(torch.Tensor, fakes.from_tensor, batch)
        optimizer = create_optimizer(config, student.model, fused=True)  # as on a GPU
        objective = train.create_objective(student, own, "graph", setup.ranks)
        captured = step.CapturedStep(setup, objective, optimizer)
        captured.run(batch)  # makes the optimizer's state
        for reads in ("cpu", "numpy", "tolist"):
            monkeypatch.setattr(torch.Tensor, reads, no_read)
        captured.run(batch)
        if unlabelled:  # as mixed images have labels: shares, a row of zeros for none
            labelled = (batch.targets >= 0)[:, None]
            captured.run(batch._replace(targets=F.one_hot(batch.targets.clamp(min=0), 100) * labelled))
        with pytest.raises(Exception, match="local_scalar"):
            bool(captured.meter.sums[0])  # what a read would do
        with pytest.raises(Exception, match="local_scalar"):
            bool(batch.targets[0] < 0)
