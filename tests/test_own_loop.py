"""The training loop of the documentation, with students, loaders and settings as people have them."""
import pickle
import re

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.utils import unwrap_model
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from conftest import ROOT
from test_recipes import blocks
from vitdistill import api
from vitdistill.base import VitdistillError
from vitdistill.data.views import normalize
from vitdistill.deploy.predict import predict
from vitdistill.losses import OBJECTIVES, Batch, RelationalDistillation, whole_batch

CLASSES = ["a", "b", "c"]
PLAIN = ((0.0,) * 3, (1.0,) * 3)
IMAGE = ROOT / "docs/_static/jupyterlab.png"
[LOOP] = [block for block in blocks("python") if "in train_loader" in block]
[DATASET] = [block for block in blocks("python") if "Dataset)" in block]


def made():
    return timm.create_model("test_resnet", num_classes=3)


class Pictures(Dataset):
    """Six images with their numbers, in one view; a label is what the teacher answers."""
    def __init__(self, teacher, classes=CLASSES, more=0):
        self.pixels = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        self.labels = teacher(self.pixels).argmax(-1) + more
        self.classes = classes

    def __len__(self):
        return 6

    def __getitem__(self, row):
        return self.pixels[row], self.labels[row], row, 0


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a teacher of three classes."""
    torch.manual_seed(0)
    return api.save(made(), tmp_path_factory.mktemp("teacher") / "model", CLASSES, 32, PLAIN)


@pytest.fixture
def loop(teacher, tmp_path):
    """Returns what runs the loop with a student, data, and other names that it knows; returns the memo."""
    def run(student=None, data=None, compute=torch.float32, **more):
        data = Pictures(api.load_teacher(teacher)) if data is None else data
        student = made() if student is None else student
        student.to(compute)
        loader = DataLoader(data, 2)
        known = dict(student=student, optimizer=torch.optim.SGD(student.parameters(), 0.1), classes=CLASSES,
                     train_set=data, train_loader=loader, val_loader=loader) | more
        code = LOOP.replace("out/mine/models/teacher", str(teacher)).replace("size=64", "size=32")
        exec(re.sub("out/(memo|student)", rf"{tmp_path}/\1", code), known)
        assert predict(tmp_path / "student", IMAGE)["class"].isin(CLASSES).all()
        saved = api.load_teacher(tmp_path / "student")
        pixels = loader.dataset[0][0][None]
        expected = unwrap_model(student).eval()(pixels.to(compute)).float()
        assert torch.allclose(saved(pixels), expected, atol=1e-4)
        return known["answers"]
    return run


def shared():
    student = made()
    student.layer1[0].bn2 = student.layer1[0].bn1
    return student


def test_students(loop):
    """In another memory format, compiled, in a wrapper of ranks, with weights that two layers share."""
    loop(made().to(memory_format=torch.channels_last))
    loop(torch.compile(made(), backend="eager"))
    loop(nn.DataParallel(made()))
    loop(shared())


def test_parts_of_datasets(loop, teacher):
    sees = api.load_teacher(teacher)
    swapped = Pictures(sees, ["b", "a", "c"])
    for together in lambda data: Subset(data, [3, 4, 5, 0, 1, 2]), lambda data: ConcatDataset([data, data]):
        loop(data=together(Pictures(sees)))
        with pytest.raises(VitdistillError, match="another order"):
            loop(data=together(swapped))


def test_another_default_dtype(loop, teacher):
    data = Pictures(api.load_teacher(teacher))
    expected = loop(data=data)(data.pixels[:1], [0])
    data.pixels = data.pixels.double()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.allclose(loop(data=data, compute=torch.float64)(data.pixels[:1], [0]), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_memo_keeps_no_answer_that_is_not_finite(teacher, tmp_path):
    answers = api.memo(api.load_teacher(teacher), tmp_path, api.loss("hard"), keys=4)
    pixels = torch.rand(2, 3, 32, 32)
    with pytest.raises(VitdistillError, match="not finite"):
        answers(pixels * torch.nan, [0, 1])
    assert answers(pixels, [0, 1]).equal(answers(pixels, [2, 3]))


def test_a_model_replaces_no_other_file(tmp_path):
    (tmp_path / "README.md").write_text("my notes")
    with pytest.raises(VitdistillError, match="holds README.md, which is of no model"):
        api.save(made(), tmp_path, CLASSES, 32, PLAIN)
    with pytest.raises(VitdistillError, match="is a file"):
        api.save(made(), tmp_path / "README.md", CLASSES, 32, PLAIN)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    folder = api.save(made(), tmp_path / "model", CLASSES, torch.tensor(32), ((0.5,), (0.5,)))
    assert api.save(made(), folder, CLASSES, 32, PLAIN) == folder  # a later model of one's own
    (folder / "card.json").write_text("{}")
    with pytest.raises(VitdistillError, match="is the model of a run"):
        api.save(made(), folder, CLASSES, 32, PLAIN)


def test_a_model_is_read_as_it_was_saved(tmp_path):
    """At its size, though timm built it for another; without squeezing, by us and by timm; also a table of
    weights."""
    student = timm.create_model("xcit_nano_12_p16_224", num_classes=3, depth=1)
    folder = api.save(student, tmp_path / "xcit", CLASSES, 64, PLAIN, depth=1)
    pixels = torch.rand(2, 3, 64, 64)
    assert torch.allclose(api.load_teacher(folder)(pixels), student.eval()(pixels), atol=1e-4)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    about = timm.data.resolve_model_data_config(again)
    assert about["input_size"] == (3, 64, 64) and about["crop_mode"] == "center"
    student.train()
    student.norm.eval()
    modes = [part.training for part in student.modules()]
    api.save(student, tmp_path / "xcit", CLASSES, 64, PLAIN, depth=1)
    assert [part.training for part in student.modules()] == modes


def test_a_student_that_is_another_is_not_saved(tmp_path):
    """A layer without weights was changed by hand; a size that it can't take."""
    student = timm.create_model("resnet10t", num_classes=3)
    student.maxpool = nn.Identity()
    with pytest.raises(VitdistillError, match="answers otherwise: a layer was changed by hand"):
        api.save(student, tmp_path / "model", CLASSES, 32, PLAIN)
    fixed = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1)
    with pytest.raises(VitdistillError, match="can not read RGB images of 64 px"):
        api.save(fixed, tmp_path / "model", CLASSES, 64, PLAIN, depth=1)


@pytest.mark.parametrize("given, message", [
    (dict(size="32"), "size = '32'"), (dict(size=0), "size = 0"), (dict(mean_std=(0, 1)), "mean_std"),
    (dict(mean_std=((0.5,) * 3, (0.0,) * 3)), "mean_std"),
    (dict(classes=["a", "a", "b"]), "'a' stands twice")])
def test_a_model_that_could_not_be_read_is_not_saved(tmp_path, given, message):
    with pytest.raises(VitdistillError, match=message):
        api.save(made(), tmp_path / "model", **(dict(classes=CLASSES, size=32, mean_std=PLAIN) | given))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("given, message", [
    (dict(mean_std=None), "mean_std = None"), (dict(precision="bf16-weight"), "mean 'bf16-weights'"),
    (dict(device="gpu"), "device = 'gpu' is not known"),
    (dict(weights="nope"), "no model in .*/nope")])
def test_a_teacher_that_could_not_answer_is_not_loaded(teacher, given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VitdistillError, match=message):
        api.load_teacher(**(dict(weights=teacher) | given))


@pytest.mark.parametrize("given, message", [
    (dict(val_loader=[]), "yields no images"),
    (dict(classes=["a", "b"]), "2 names of classes"),
    (dict(more=3), "fit no 3 classes")], ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_refused(loop, teacher, given, message):
    more = dict(given)
    data = Pictures(api.load_teacher(teacher), more=more.pop("more", 0))
    with pytest.raises(VitdistillError, match=message):
        loop(data=data, **more)


def test_crops_and_flips_have_keys_of_their_own(loop, teacher):
    """Over several epochs of the documented dataset the memo answers about the pixels of each step; keys
    that are numbers of images are refused as soon as another view comes."""
    sees, known = api.load_teacher(teacher), {}
    images = Pictures(sees)
    exec(DATASET, known)
    data = known["Views"]([image[:2] for image in images])
    data.classes = CLASSES
    torch.manual_seed(0)
    answers, asked = loop(data=data, val_loader=DataLoader(images, 2)), []
    hook = answers.teacher.model.register_forward_pre_hook(lambda *_: asked.append(1))
    for _ in range(20):
        for pixels, _, image, view in DataLoader(data, 2):
            expected = answers.kind.make(sees(pixels))
            assert torch.allclose(answers(pixels, image * 18 + view), expected, atol=0.05)
    hook.remove()
    assert 0 < len(asked) < 60  # of sixty batches
    by_image = api.memo(sees, answers.folder / "by image", api.loss("hard"), keys=6)
    with pytest.raises(VitdistillError, match="key [0-5] comes with other pixels"):
        for _ in range(3):
            for pixels, _, image, _ in DataLoader(data, 2):
                by_image(pixels, image)


@pytest.mark.parametrize("name", ["hard", "soft"])
def test_a_memo_of_other_images_is_refused(name, teacher, tmp_path):
    """In the next program; the same images are known in half precision, normalized, and on their own."""
    plain = api.load_teacher(teacher), tmp_path, api.loss(name), 8
    first, second = torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    answers = api.memo(*plain)(first, range(8))
    assert api.memo(*plain)(first.half(), torch.arange(8)).equal(answers)
    with torch.autocast("cpu", torch.bfloat16):
        assert api.memo(*plain)(first[5:6], [5]).equal(answers[5:6])
    with pytest.raises(VitdistillError, match="8 of 8 keys.*the images have changed, another folder"):
        api.memo(*plain)(second, range(8))
    with pytest.raises(VitdistillError, match="key 3 comes with other pixels"):
        api.memo(*plain)(first.flip(-1)[3:4], [3])


def test_a_memo_of_another_teacher_is_refused(teacher, tmp_path):
    """Whose weights are the same, and whose layers compute something else."""
    pixels, sees = torch.rand(8, 3, 32, 32), api.load_teacher(teacher)
    api.memo(sees, tmp_path, api.loss("soft"), 8)(pixels, range(8))
    sees.model.fc.register_forward_hook(lambda *parts: parts[-1] / 4)
    with pytest.raises(VitdistillError, match="differs from the teacher in 8 of 8 answers"):
        api.memo(sees, tmp_path, api.loss("soft"), 8)(pixels, range(8))


class Answered(Dataset):
    """Images with a memo's answers."""
    def __init__(self, answers, pixels):
        self.answers, self.pixels = answers, pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, row):
        return self.answers(self.pixels[row][None], [row])[0]


def test_a_memo_is_sent_to_the_workers_of_a_loader(teacher, tmp_path):
    """That are spawned: each opens the file, and what one has answered the others know."""
    pixels = torch.rand(4, 3, 32, 32)
    answers = api.memo(api.load_teacher(teacher), tmp_path, api.loss("soft"), keys=4)
    known = answers(pixels[:2], [0, 1])
    loader = DataLoader(Answered(answers, pixels), 4, num_workers=1, multiprocessing_context="spawn")
    [of_worker] = loader
    assert of_worker[:2].equal(known) and answers(pixels, range(4)).equal(of_worker)


def test_a_compiled_teacher_is_pickled(teacher):
    sees, pixels = api.load_teacher(teacher), torch.rand(2, 3, 32, 32)
    expected = sees(pixels)
    made = sees.model, sees.classes, sees.constants, sees.size, sees.mean_std
    again = pickle.loads(pickle.dumps(type(sees)(*made, compile=True)))
    assert again.compile and again.forward is not again.model
    assert type(sees)(again.model, *made[1:])(pixels).equal(expected)


WITH_TEACHER = [name for name, made in OBJECTIVES.items() if made.wants]


@pytest.mark.parametrize("name", WITH_TEACHER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_within_autocast_is_that_of_float32(name, dtype):
    """The value and the gradient, also where the default dtype is float64."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 20, generator=generator) * 4
    start = teacher + torch.randn(64, 20, generator=generator) * 0.3
    criterion, results = api.loss(name, alpha=1.0), []
    for on, default in (False, torch.float32), (True, torch.float32), (True, torch.float64):
        z = start.clone().requires_grad_()
        torch.set_default_dtype(default)
        try:
            with torch.autocast("cpu", dtype, enabled=on):
                value = criterion(z, teacher, teacher.argmax(1))
        finally:
            torch.set_default_dtype(torch.float32)
        value.backward()
        results.append((value.detach(), z.grad))
    for value, gradient in results[1:]:
        assert value.dtype == torch.float32
        assert torch.allclose(value, results[0][0], rtol=1e-5)
        assert torch.allclose(gradient, results[0][1], rtol=1e-4, atol=1e-7)


class Gram(RelationalDistillation):
    """A loss of one's own, of products between the images of the whole batch."""
    def term(self, logits, batch):
        student, teacher = whole_batch(logits), whole_batch(batch.answer)
        return (student @ student.T - teacher @ teacher.T).square().mean()


def test_a_loss_of_ones_own_is_computed_in_float32():
    z, teacher = torch.randn(2, 16, 10, generator=torch.Generator().manual_seed(0))
    expected = (z @ z.T - teacher @ teacher.T).square().mean()
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = Gram(alpha=1.0)((z,), Batch(None, teacher.argmax(1), teacher))
    assert torch.allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["dist", "rsd"])
def test_one_rank_of_several_can_measure_a_loss(name, monkeypatch):
    """Without gradients it asks no other rank, which may be at a barrier; with gradients it has to."""
    z, teacher = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    labels, criterion = torch.arange(8) % 4, api.loss(name)
    alone = criterion(z, teacher, labels)

    def waits(*_):
        raise AssertionError("waits for the other rank")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "all_reduce", waits)
    with torch.no_grad():
        assert criterion(z, teacher, labels).equal(alone)
    with pytest.raises(AssertionError, match="waits for the other rank"):
        criterion(z, teacher, labels)


def test_a_teachers_logits_are_a_target_of_any_loss(teacher):
    """Of mean squared error, in place; also where the answers were computed in inference mode."""
    sees, student, pixels = api.load_teacher(teacher), made(), torch.rand(4, 3, 32, 32)
    F.mse_loss(student(pixels), sees(pixels)).backward()
    mean = sees(pixels)
    mean += sees(pixels)
    (student(pixels) * mean / 2).mean().backward()
    with torch.inference_mode():
        answer = sees(pixels)
    for name in WITH_TEACHER:
        api.loss(name)(student(pixels), answer, answer.argmax(-1)).backward()


def test_pixels_are_normalized_in_float32_whatever_the_default_was():
    """Of constants that no earlier test has asked for."""
    constants = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2617)
    pixels = torch.full((1, 3, 2, 2), 200, dtype=torch.uint8)
    torch.set_default_dtype(torch.float64)
    try:
        normalize(pixels, *constants)
    finally:
        torch.set_default_dtype(torch.float32)
    assert normalize(pixels, *constants).dtype == torch.float32


class Net(nn.Module):
    """A module that is none of timm's."""
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.drop = nn.Dropout()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.drop(self.conv(x).mean((2, 3))))


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalized(pixels, constants):
    mean, std = (torch.tensor(part)[:, None, None] for part in constants)
    return (pixels - mean) / std


def test_a_module_of_ones_own_teaches():
    """A copy of it, frozen, gets the loader's pixels as they are; or at the size and with the constants that
    are given."""
    net, pixels = Net(), torch.rand(3, 3, 16, 16)
    given = normalized(pixels, IMAGENET)
    sees = api.load_teacher(net, IMAGENET, classes=CLASSES)
    own = api.load_teacher(nn.DataParallel(net), classes=CLASSES, size=8, constants=((0.5,) * 3, (0.25,) * 3))
    assert net.training and all(p.requires_grad for p in net.parameters())
    expected = net.eval()(given)
    assert torch.allclose(sees(given), expected, atol=1e-4)
    halved = F.interpolate((pixels - 0.5) / 0.25, (8, 8), mode="bilinear")
    assert torch.allclose(own(pixels), net(halved), atol=1e-4)
    net.head.weight.data.zero_()  # the teacher has its own
    assert torch.allclose(sees(given), expected, atol=1e-4)
    assert 0 <= sees.check([(given, expected.argmax(1))]) <= 1


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file of weights of test_resnet, for 1,000 classes, which timm has as its pretrained weights."""
    torch.manual_seed(0)
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), file)
    monkeypatch.setattr("timm.models._builder.load_pretrained",
                        lambda model, **_: model.load_state_dict(load_file(file)))
    return file


def test_any_model_of_timm_teaches(weights):
    """By its name with timm's weights, or by a file; its own constants are undone and done."""
    model = timm.create_model("test_resnet").eval()
    model.load_state_dict(load_file(weights))
    about = model.pretrained_cfg
    side, constants = about["input_size"][-1], (about["mean"], about["std"])
    pixels = torch.rand(2, 3, side, side)
    expected = model(normalized(pixels, constants))
    named = api.load_teacher("test_resnet", IMAGENET)
    assert named.classes[0] == "n01440764" and len(named.classes) == 1000  # the tench
    assert torch.allclose(named(normalized(pixels, IMAGENET)), expected, atol=1e-4)
    by_file = api.load_teacher(weights, architecture="test_resnet", classes=range(1000))
    assert torch.allclose(by_file(pixels), expected, atol=1e-4)
    plain = api.load_teacher(weights, architecture="test_resnet", classes=range(1000), constants=PLAIN)
    assert torch.allclose(plain(pixels), model(pixels), atol=1e-4)


@pytest.mark.parametrize("given, message", [
    (dict(weights=Net()), "Net does not name its classes"),
    (dict(weights="test_resnet", classes=CLASSES), "trained for 1000 classes and 3 are given"),
    (dict(weights="resnet18_plain"), "no pretrained weights of resnet18_plain"),
    (dict(weights="resnet18_plane"), "timm has none of this name: did you mean 'resnet18_plain'"),
    (dict(), "holds weights alone: give their architecture"),
    (dict(architecture="test_resnet"), "classes="),
    (dict(architecture="test_resnet", classes=CLASSES), "fc.weight is .1000"),
    (dict(architecture="test_resnets", classes=CLASSES), "unknown model 'test_resnets'"),
    (dict(size=-1), "size = -1")], ids=lambda value: value if isinstance(value, str) else "")
def test_a_teacher_without_what_it_needs(weights, given, message):
    with pytest.raises(VitdistillError, match=message):
        api.load_teacher(**(dict(weights=weights) | given))


class Returns(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)


@pytest.mark.parametrize("returns", [lambda x: dict(logits=x), lambda x: (x, x), lambda x: x[:, :2],
                                     lambda x: x[:, :, None]])
def test_a_module_that_returns_no_logits(returns):
    net = Net()
    net.head = nn.Sequential(net.head, Returns(returns))
    sees = api.load_teacher(net, classes=CLASSES)
    with pytest.raises(VitdistillError, match="with logits of 3 classes.*give a module that returns"):
        sees(torch.rand(2, 3, 16, 16))


def test_a_folder_and_its_file_are_one_teacher(teacher):
    pixels = torch.rand(2, 3, 32, 32)
    assert api.load_teacher(teacher / "model.safetensors")(pixels).equal(api.load_teacher(teacher)(pixels))
    with pytest.raises(VitdistillError, match="names its classes itself .a, b, c"):
        api.load_teacher(teacher, classes=["c", "b", "a"])


def test_the_table_of_losses_has_them_all():
    rows = re.findall(r"^\| `(.+)` \|.*\| (yes|no) \|$", (ROOT / "docs/library.md").read_text(), re.M)
    assert dict(rows) == {name: "yes" if OBJECTIVES[name].needs_label else "no" for name in WITH_TEACHER}
    for name in OBJECTIVES.keys() - WITH_TEACHER:
        with pytest.raises(VitdistillError, match=f"'{name}' has no teacher: choose from hard, soft"):
            api.loss(name)
    with pytest.raises(VitdistillError, match="'rld' needs the label of each image"):
        api.loss("rld")(torch.rand(2, 3), torch.rand(2, 3), torch.tensor([0, -1]))
