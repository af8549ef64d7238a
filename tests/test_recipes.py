"""Commands and snippets of the pages run, and grids meet their records."""
import ast
import importlib
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pandas as pd
import papermill
import pytest
import timm
import yaml

from conftest import ROOT, TINY, record
from test_notebooks import execute
from vitdistill.api import save
from vitdistill.cli import COMMANDS, command_config, field_values
from vitdistill.config import Config, defining, field_names, preset
from vitdistill.data.datasets import image_side
from vitdistill.launch.queue import check_cells, grid_cells, missing_weights, start_order
from vitdistill.launch.queue import study_cells
from vitdistill.launch.parts import configure, notebook_names
from vitdistill.models.create import read_weights
from vitdistill.options import distill_parser, grid_parser
from vitdistill.runs import find_runs
from vitdistill.launch.studies import read_study, study_file, trains

RECORDS = ROOT / "reports/runs"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARTS = dict(e00_teacher="teacher", e01_baseline_resnet50="baseline", e02_distilled_resnet50="distilled",
             e03_deit_from_regnet="deit", e04_adopted_teacher="teacher", e06_pretrain="pretrain",
             e07_finetune="deit", e08_own_images="distilled", e09_captions="captions")
OWN = {*notebook_names} - {"preset", "role"}  # parameters of notebooks that are no fields of Config
WRITTEN = {"alpha.yaml", "again.yaml"}  # studies that the recipes write


def blocks(language, pages=PAGES):
    """Returns the code blocks of pages in one language."""
    fence = rf"^```{language}\n(.*?)^```$"
    codes = []
    for page in pages:
        codes += re.findall(fence, page.read_text(encoding="utf-8"), re.M | re.S)
    return codes


def commands(program):
    """Returns the command lines of all pages that call a program, each once and as lists of words."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    calls = [shlex.split(line, comments=True) for line in lines if re.match(rf"(\S*/)?{program} ", line)]
    return [list(words) for words in dict.fromkeys(map(tuple, calls))]


def snippet(part):
    """Returns the Python block of docs/library.md that holds this text."""
    [code] = [code for code in blocks("python", [ROOT / "docs/library.md"]) if part in code]
    return code


def given_of(words):
    """Returns the notebook's name and the parameters of a papermill command."""
    pairs = {words[i + 1]: yaml.safe_load(words[i + 2]) for i, word in enumerate(words) if word == "-p"}
    for text in (words[i + 1] for i, word in enumerate(words) if word == "-y"):
        pairs |= yaml.safe_load(text)
    return re.search(r"(\w+)\.ipynb", words[1])[1], pairs


def part_of(notebook, given):
    """Returns the part of a preset that an experiment notebook trains first."""
    return given.get("role", PARTS[notebook]) if notebook[:3] in ("e00", "e07") else PARTS[notebook]


RECIPES = commands("papermill")
EXPERIMENT_RECIPES = [words for words in RECIPES if "nbs/experiments/" in words[1]]


def name_of(words):
    """Returns the name of the notebook that a recipe writes."""
    return re.search(r"(\w+)\.ipynb", words[2])[1]


@pytest.mark.parametrize("words", RECIPES, ids=name_of)
def test_recipe_names_a_notebook_and_its_parameters(words):
    notebook, given = given_of(words)
    declared = papermill.inspect_notebook(str(ROOT / words[1]))
    assert (ROOT / words[1]).is_file() and words[2].startswith("out/")
    assert given.keys() <= declared.keys() | ({*field_names()} if notebook in PARTS else set())


@pytest.mark.parametrize("words", EXPERIMENT_RECIPES, ids=name_of)
def test_recipe_makes_a_config(words):
    """A value out of its range, or of another type, is an error of `configure`."""
    notebook, given = given_of(words)
    declared = papermill.inspect_notebook(str(ROOT / words[1]))
    values = {"preset": ast.literal_eval(declared["preset"]["default"])} | given
    part = part_of(notebook, given)
    fields = {name: value for name, value in values.items() if name not in OWN}
    config = configure(part, fields)
    assert config.experiment == part
    if notebook[:3] != "e08":  # `distill` chooses the size of its images
        assert image_side(config)


@pytest.mark.slow
@pytest.mark.parametrize("words", EXPERIMENT_RECIPES, ids=name_of)
def test_recipe_runs(words, tmp_path):
    """Runs a recipe with the digits, tiny models, one epoch, one process and files that are made here."""
    notebook, given = given_of(words)
    small = dict(preset="demo", epochs=1, nproc=1, runs_dir=str(tmp_path / "runs"),
                 work_dir=str(tmp_path / "work"))
    student = dict(student="resnet18") if notebook[:3] in ("e01", "e02") else dict(student_kwargs=TINY)
    convnet = given.get("role") == "deit_teacher"
    small |= student if "student" not in given and not convnet else {}
    if given.get("student", "").startswith("deit"):
        small |= dict(student_kwargs=TINY)
    if notebook.startswith("e06"):  # with the small transformer of its own preset
        small |= dict(preset=given["preset"], student_kwargs=None)
    if notebook.startswith("e09"):  # likewise, which captions digits
        given = {name: value for name, value in given.items() if not name.startswith("student")}
        small |= dict(preset="captions_demo", student_kwargs=None)
    if notebook.startswith("e03"):
        small |= dict(allow_untrained=True, teacher_weights=None)
    if notebook.startswith("e02"):
        folds = given.get("out_of_fold")  # two teachers are trained here, on all digits
        small |= dict(teacher_kwargs=TINY, data_fraction=1.0 if folds else 0.5)
        small |= {} if folds else dict(allow_untrained=True, teacher_weights=None)
    if given.get("preset") == "own" and "labels" not in given:
        small |= dict(dataset="imagefolder", data_root=str(folders(tmp_path / "images")), image_size=32,
                      batch_size=8)
    if "labels" in given:
        images = folders(tmp_path / "images")
        files = [path.relative_to(images) for path in images.rglob("*.png")]
        table = [dict({"file": str(file), "class": file.parts[1], "part": file.parts[0]}) for file in files]
        pd.DataFrame(table).to_csv(tmp_path / "labels.csv", index=False)
        small |= dict(dataset="imagefolder", data_root=str(images), labels=str(tmp_path / "labels.csv"),
                      image_size=32, batch_size=8)
    if notebook.startswith("e04"):
        small |= dict(weights=str(tiny_weights(tmp_path)), val_rows="1200:1438", allow_untrained=True)
    if notebook.startswith("e07"):
        small |= dict(student="vit_tiny_patch16_224", student_weights=str(tiny_weights(tmp_path)),
                      data_fraction=0.5)
    if notebook.startswith("e00"):
        small |= dict(student_pretrained=False)
    if notebook.startswith("e08"):
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY)
        teacher = save(vit, tmp_path / "vit", [*"0123456789"], 32, ((0.5,) * 3, (0.5,) * 3), **TINY)
        small = dict(data=str(folders(tmp_path / "images")), teacher=str(teacher), out=str(tmp_path),
                     epochs=1, nproc=1, image_size=32, teacher_size=32, allow_untrained=True)
    execute(notebook, tmp_path / "run.ipynb", **given | small)
    done = [run.status for run in find_runs(tmp_path / "runs")]
    assert set(done) <= {"done"} and (done or list((tmp_path / "work").glob("*/model/card.json")))


def folders(root):
    """Writes two classes of a few random pictures, for training and validation."""
    from PIL import Image
    for part, n in dict(train=12, val=4).items():
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = np.random.default_rng(i).integers(0, 255, (80, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def tiny_weights(folder):
    """Writes the weights of a small vision transformer and returns the file."""
    from safetensors.torch import save_file
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY)
    save_file(model.state_dict(), folder / "a.safetensors")
    return folder / "a.safetensors"


VITDISTILL = commands("vitdistill")


def test_the_study_of_the_recipes_can_train(tmp_path):
    """What `vitdistill grid alpha.yaml` trains has settings that fit."""
    (tmp_path / "alpha.yaml").write_text(*blocks("yaml", [ROOT / "docs/recipes.md"]))
    check_cells(study_cells(read_study(tmp_path / "alpha.yaml")))


def test_the_recipe_trains_one_of_our_studies_again(tmp_path):
    """Its copy of a study puts all runs where none of our records is, and needs no weights."""
    [(*sed, _, name)] = commands("sed")
    text = subprocess.run(sed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    (tmp_path / name).write_text(text)
    cells = study_cells(read_study(tmp_path / name))
    check_cells(cells)
    assert {cell.config.runs_dir for cell in cells} == {"out/again/runs"}
    assert not missing_weights(cells)


@pytest.mark.parametrize("words", VITDISTILL, ids=" ".join)
def test_command_and_its_options_exist(words, capsys, tmp_path, monkeypatch):
    assert words[1] in COMMANDS
    if words[1] == "train":
        if "run.yaml" in words:  # the reader's own
            monkeypatch.chdir(tmp_path)
            (tmp_path / "run.yaml").write_text("epochs: 2")
        given, source = field_values([word for word in words[2:] if word != "--dry-run"])
        config = command_config(source, given)
        assert all(getattr(config, name) == value for name, value in given.items()) and image_side(config)
    elif words[1] == "distill":
        options, others = distill_parser().parse_known_args(words[2:])
        given, source = field_values(others)
        assert not source and preset(options.preset, "baseline", **given)
    elif words[1] == "grid":
        assert words[2] in WRITTEN or study_file(grid_parser().parse_args(words[2:]).grid)
    else:
        with pytest.raises(SystemExit, match="0"):
            COMMANDS[words[1]](["--help"])
        shown = capsys.readouterr().out
        assert all(word in shown for word in words[2:] if word.startswith("-"))


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {words[1] for words in commands("make")}
    assert named <= targets


def test_grids_of_the_pages_need_nothing_that_a_clone_lacks():
    named = {words[2] for words in VITDISTILL if words[1] == "grid"} - WRITTEN
    assert named and not any(missing_weights(grid_cells(ROOT / path)) for path in named)


@pytest.mark.slow
def test_commands_train_and_export(tmp_path):
    """Trains a student on a tenth of the digits and writes its curves and its ONNX file, by the commands'
    options."""
    train = next(words for words in VITDISTILL if words[1] == "train" and "--track" in words)
    export = next(words for words in VITDISTILL if words[1] == "export" and "--to" in words)
    train[train.index("--runs-dir") + 1] = str(tmp_path / "runs")
    small = dict(work_dir=tmp_path / "work", student="resnet18", data_fraction=0.1, epochs=1)

    def vitdistill(*words):
        subprocess.run([sys.executable, "-m", "vitdistill.cli", *map(str, words)], cwd=ROOT, check=True)
    vitdistill(*train[1:], *(word for name, value in small.items() for word in (f"--{name}", value)))
    [run] = find_runs(tmp_path / "runs")
    assert run.status == "done" and run.config.lr == 0.02 and list(tmp_path.rglob("events.out.tfevents*"))
    vitdistill(*(str(run.folder) if "<run>" in word else word for word in export[1:]))
    assert list((tmp_path / "work").rglob("*.onnx"))


@pytest.mark.parametrize("code", blocks("python"), ids=range(len(blocks("python"))))
def test_snippet_imports_what_is_there(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_training_loop_of_the_library_runs(tmp_path, capsys):
    where = f"allow_untrained=True, work_dir={str(tmp_path)!r}, padding=0"
    seen = {}
    exec(snippet("setup.criterion").replace("allow_untrained=True", where), seen)
    assert seen["loss"].isfinite() and {"label", "teacher"} <= set(seen["parts"])
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in seen["setup"].student.parameters())
    said = capsys.readouterr().out
    assert "the teacher's answers: " in said and "images that it held out" in said


def test_the_loss_of_the_library_is_both_cross_entropies():
    from torch.nn.functional import cross_entropy
    seen = {}
    exec(snippet("SwitchedDistillationLoss"), seen)
    halves = [cross_entropy(seen["student"], y) for y in (seen["labels"], seen["teacher"].argmax(1))]
    assert seen["loss"].item() == pytest.approx(sum(halves).item() / 2, rel=1e-6)


def test_a_trained_model_is_used_as_the_library_does(teacher, tmp_path, capsys):
    """The model has its weights, and an image is prepared as in training: its own size, the run's mean and
    std."""
    from PIL import Image
    pixels = np.random.default_rng(0).integers(0, 255, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    code, seen = snippet("local-dir:"), {}
    code = re.sub(r"Path\('[^']*'\)", f"Path({str(teacher)!r})", code)
    exec(code.replace("'image.png'", repr(str(tmp_path / "image.png"))), seen)
    saved = read_weights(teacher)
    assert all((value == saved[name]).all() for name, value in seen["model"].state_dict().items())
    assert seen["prepare"](seen["image"]).shape == (3, 32, 32)
    about = json.loads((seen["folder"] / "card.json").read_text())
    assert seen["prepare"].transforms[-1].mean.tolist() == pytest.approx(about["constants"][0])
    assert seen["classes"] == about["classes"] and capsys.readouterr().out.split()[0] in about["classes"]


def test_runs_are_watched_as_the_library_does(tmp_path, capsys):
    """Each name fits one run of the demo, though the DeiT's has `distilled` in it too."""
    plain = dict(student="resnet10t")
    taught = dict(plain, experiment="distilled", teacher="vit_tiny_patch16_224", distillation="soft")
    deit = dict(taught, experiment="deit", student="deit_tiny_distilled_patch16_224", teacher="regnety_002")
    for made in plain, taught, deit, dict(experiment="teacher", student="vit_tiny_patch16_224"):
        config = Config(dataset="digits", epochs=2, runs_dir=str(tmp_path / "runs"), **made)
        record(config, metrics=pd.DataFrame(dict(epoch=[0, 1], test_top1=[0.1, 0.5])), test_top1=0.5)
    lines = snippet("compare_runs").replace("'out/demo/runs'", repr(str(tmp_path / "runs")))
    seen = {}
    exec(lines.replace("\ncompare", "\nfig = compare"), seen)
    assert "distilled-resnet10t-vit_tiny" in capsys.readouterr().out and len(seen["fig"].axes[0].lines) == 2


# a run fills them in
FOUND = frozenset({"data_hash", "weights_hash", "teacher_hash", "unlabelled_hash", "modules_hash"})
STUDIES = [read_study(file) for file in sorted((ROOT / "nbs/studies").glob("*.yaml"))]


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_study_says_what_it_asks(study):
    """It asks a question; each cell starts after those that it waits for; references train nothing."""
    cells = study_cells(study)
    assert study.title and study.asked
    assert cells or all("arms" in arm for arm in study.arms.values())  # only a study of references has none
    order = start_order(cells)
    assert sorted(order) == list(range(len(cells)))
    assert all(order.index(first) < order.index(n) for n in order for first in cells[n].after)
    if study.name == "deit_resolution":  # a student that goes on waits for the run that it begins with
        begun = set()
        for cell in cells:
            if cell.part == "finetune":
                begun |= {cells[first].arm for first in cell.after}
        assert begun == {"deit_resolution/student on labels", "deit_resolution/taught student"}


def test_records_name_arms_of_studies():
    """Each record serves an arm that its study trains."""
    trained = set()
    for study in STUDIES:
        trained |= {f"{study.name}/{name}" for name, part in study.parts.items() if trains(part)}
    for run in find_runs(RECORDS):
        assert run.arms and {*run.arms} <= trained, run.name


TOLD = {"teacher", "teacher_kwargs", "teacher_size", "teacher_normalization"}  # by the card of a folder
CHANGED = {"pair", "small_deit"}  # their presets, for short looks, have changed since


def known(config, has_card):
    """Returns what is given of a config, as text; has_card: whether its teacher is a folder with a card."""
    left_out = FOUND | TOLD if has_card else FOUND
    given = {key: value for key, value in defining(config).items() if key not in left_out}
    return json.dumps([config.experiment, given], sort_keys=True)


def test_records_are_cells_of_the_studies_that_they_name():
    """Also if fields or presets have changed since; adopted and fine-tuned models have settings of their
    weights."""
    wanted = {}
    for run in find_runs(RECORDS):
        if run.config.experiment not in ("adopted_teacher", "finetune"):
            for study in {arm.partition("/")[0] for arm in run.arms} - CHANGED:
                wanted.setdefault(study, []).append(run)
    assert wanted
    for study, runs in wanted.items():
        cells = [cell.config for cell in grid_cells(study)]
        made = {known(config, has_card) for config in cells for has_card in (True, False)}
        for run in runs:
            has_card = bool(run.config.teacher_weights)
            assert known(run.config, has_card) in made, f"{run.name} is no cell of {study}"
        if study in ("small_tuned", "deit_strengths"):
            assert {known(run.config, True) for run in runs} == {known(config, True) for config in cells}
