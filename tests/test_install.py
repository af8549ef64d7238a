"""Away from a clone: what a wheel holds, its commands in a folder of one's own, and what the package
declares."""
import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from PIL import Image

from conftest import ROOT, SETTINGS, tracked

from vitdistill.runs import find_runs

ENGINE = SETTINGS["requirements"].splitlines()[0].split()  # what training needs of the requirements
BY_THEMSELVES = {"ipykernel", "ipywidgets", "jupyterlab", "onnxscript", "tensorboard"}  # others import them
SMALL_VIT = "{img_size: 32, patch_size: 8, embed_dim: 48, depth: 1, num_heads: 3}"


def cli(*words):
    return "-m", "vitdistill.cli", *words


def test_wheel_holds_what_travels(wheel):
    """The modules, and each shipped file once, as the repository has it, but for the outputs of notebooks."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        shipped = tracked(*SETTINGS["shipped"].split())
        shipped = [name for name in shipped if not Path(name).name.startswith(".")]
        shared = [f"vitdistill/share/{name}" for name in shipped]
        assert sorted(names) == sorted([*tracked("vitdistill"), *shared])
        for name in shipped:
            there = archive.read(f"vitdistill/share/{name}")
            here = (ROOT / name).read_bytes()
            if name.endswith(".ipynb"):
                there, here = json.loads(there), json.loads(here)
                assert not any(cell.get("outputs") for cell in there["cells"]), name
                for cell in here["cells"]:
                    if "outputs" in cell:
                        cell["outputs"] = []
            assert there == here, name
        files = [name for name in archive.namelist() if ".dist-info/" in name]
        info = {Path(name).name: archive.read(name).decode() for name in files}
    said = Parser().parsestr(info["METADATA"])
    assert said["Version"] == SETTINGS["version"] and said["Requires-Python"] == f">={SETTINGS['min_python']}"
    assert {"notebooks", "docs", "dev"} <= set(said.get_all("Provides-Extra"))
    assert "vitdistill = vitdistill.cli:main" in info["entry_points.txt"]
    links = re.findall(r"\]\(([^)#]+)", said.get_payload())  # of README, which PyPI shows away from the clone
    assert links and all(link.startswith("https://") for link in links)


AWAY = """
import io, os, sys
from contextlib import redirect_stdout
from pathlib import Path
sys.modules["fcntl"] = None  # as on Windows
import vitdistill
from vitdistill.cli import main
from vitdistill.base import SHIPPED, repo_root
from vitdistill.config import preset


def said(*words):
    told = io.StringIO()
    try:
        with redirect_stdout(told): main(list(words))
    except SystemExit as ended: print(ended.code or "", file=told)
    return " ".join(told.getvalue().split())


print("version", vitdistill.__version__, said("--version").split()[1])
print("shipped", SHIPPED.name, preset("paper", "distilled").batch_size, repo_root() == Path.cwd())
said("new", "mine")
Path("mine/nbs/presets/own.yaml").write_text("baseline: {lr: -1}")
os.chdir("mine/nbs")
print("root", repo_root() == Path.cwd().parent, said("train", "--config", "own:baseline"))
grid = said("grid", "studies/rates.yaml", "--dry-run")
print("grid", "taught lr=0.03 seed=1" in grid and "taught seed=1" in said("grid", "pair", "--dry-run"))
sys.modules["papermill"] = None
print("lacking", said("demo"))
from vitdistill.study import agreement, compare, page, results, trends, watch
from vitdistill.runs import find_runs
print("reference", len(results.published()) > 20, len(agreement.class_names("cifar100", 100)))
runs = [run for run in find_runs(sys.argv[1]) if run.config.experiment == "baseline"]
print("analysis", *{run.status for run in runs}, len(results.curves(runs)) > 100)
"""


def test_package_away_from_a_clone(away, tmp_path):
    """Presets, numbers and notebooks are the wheel's; relative paths mean the user's folder; no fcntl is
    needed."""
    lines = away(tmp_path, "-W", "ignore", "-c", AWAY, ROOT / "reports/runs").splitlines()
    said = dict(line.split(" ", 1) for line in lines)
    assert said["version"] == f"{SETTINGS['version']} {SETTINGS['version']}"
    assert said["shipped"] == "share 128 True" and said["reference"] == "True 100"
    assert said["root"].startswith("True lr = -1.0 is out of range")
    assert said["grid"] == "True" and "done" in said["analysis"] and said["analysis"].endswith("True")
    assert "papermill" in said["lacking"] and "pip install" in said["lacking"]
    mine = tmp_path / "mine"
    assert not list((mine / "out").iterdir()) and not (mine / "reports").exists()  # nothing half-written


@pytest.mark.slow
def test_pair_from_a_wheel(away, tmp_path):
    """`vitdistill new`, then e01 and e02 as it copied them, by papermill, and figures: all is in that
    folder."""
    away(tmp_path, *cli("new", "mine"))
    mine = tmp_path / "mine"
    short = ["-p", "epochs", "2", "-p", "student", "resnet18", "-p", "data_fraction", ".2"]

    def papermill(notebook, *words):
        name = Path(notebook).stem
        away(mine, "-m", "papermill", notebook, f"out/{name}.ipynb", "--cwd", ".", "--no-progress-bar",
             *words)

    papermill("nbs/experiments/e01_baseline_resnet50.ipynb", *short)
    untrained = ["-p", "allow_untrained", "True", "-y", f"teacher_kwargs: {SMALL_VIT}"]
    papermill("nbs/experiments/e02_distilled_resnet50.ipynb", *short, *untrained)
    end = "from vitdistill.cli import Path, run_notebook; run_notebook('a01_paper', Path('out/a01.ipynb'), " \
          "dict(reports='out/demo/runs', out='out/demo'))"  # as `vitdistill demo` ends
    away(mine, "-c", end)
    away(mine, *cli("figures"))
    runs = find_runs(mine / "out/demo/runs")
    assert [run.config.experiment for run in runs] == ["baseline", "distilled"]
    assert all(run.status == "done" and run.epochs_done == 2 for run in runs)
    about = runs[0].environment
    assert about["vitdistill"] == SETTINGS["version"]
    assert about["commit"] == os.environ.get("VITDISTILL_COMMIT", "")
    assert str(tmp_path) not in (runs[0].folder / "config.yaml").read_text()
    assert (mine / "out/demo/figures/figure4.svg").stat().st_size > 10_000
    assert all(run.name in (mine / "out/compare/index.html").read_text() for run in runs)


def imports(tree):
    """Names of modules that a syntax tree imports, of other packages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def normal(name):
    return re.match(r"[\w.-]+", name)[0].lower().replace("_", "-")


def declared(*extras):
    keys = [f"{extra}_requirements" if extra else "requirements" for extra in extras]
    return {normal(name) for key in keys for name in SETTINGS[key].split()}


def test_what_is_imported_is_declared_and_nothing_else():
    """Modules by the requirements and the extras; what training imports, by the first line of the
    requirements."""
    extras = [key.removesuffix("_requirements") for key in SETTINGS if key.endswith("_requirements")]
    users = [extra for extra in extras if extra not in ("dev", "docs")]
    folder = ROOT / "vitdistill"  # and the wings below it
    modules = {".".join(p.relative_to(folder).with_suffix("").parts): ast.parse(p.read_text())
               for p in folder.rglob("*.py")}
    known = packages_distributions()

    def distributions(names):
        foreign = {name for name in names if name not in sys.stdlib_module_names | {"vitdistill"}}
        return {normal(known[name][0]) if name in known else normal(name) for name in foreign}

    used = set().union(*(distributions(imports(tree)) for tree in modules.values()))
    everything = declared("", *users)
    assert used - everything == set(), "imported, but declared nowhere"
    assert everything - used - BY_THEMSELVES == set(), "declared, but imported nowhere"
    # ranks, launcher
    started = "import sys, vitdistill.launch.runner, vitdistill.train.loop; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", started], cwd=ROOT, text=True).split()
    reached = {name.removeprefix("vitdistill.") for name in loaded if name.startswith("vitdistill.")}
    reached = {name if name in modules else f"{name}.__init__" for name in reached}
    heads = []
    for name in reached:
        heads += [node for node in modules[name].body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert len(reached) > 10 and distributions(imports(ast.Module(heads, []))) <= set(map(normal, ENGINE))


ABSENT = """
import sys
for name in {names}: sys.modules[name] = None  # an import fails, as if the package were not installed
"""


def test_training_needs_the_engine_alone(tmp_path):
    """Where a machine carries its own torch (pip install --no-deps): it trains and predicts; what lacks says
    so."""
    others = {normal(name) for name in SETTINGS["requirements"].split()} - set(map(normal, ENGINE))
    names = [module for module, packages in packages_distributions().items() if normal(packages[0]) in others]
    assert {"papermill", "seaborn", "matplotlib", "scipy", "sklearn", "jinja2"} <= set(names)
    (tmp_path / "sitecustomize.py").write_text(ABSENT.format(names=names))
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    for part, images in dict(train=10, val=5).items():
        for label, colour in dict(dark=40, light=200).items():
            (folder := tmp_path / "own" / part / label).mkdir(parents=True)
            for number in range(images):
                Image.new("RGB", (32, 32), (colour + number, colour, colour)).save(folder / f"{number}.png")

    def run(*words):
        command = [sys.executable, *cli(*words)]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    fields = dict(dataset="imagefolder", data_root="own", image_size=32, student="resnet18", epochs=1,
                  batch_size=10, val_fraction=0, runs_dir="runs", work_dir="work")
    words = [word for name, value in fields.items() for word in (f"--{name}", f"{value}")]
    trained = run("train", "--config", "demo:baseline", *words)
    assert trained.returncode == 0, trained.stderr[-2000:]
    predicted = run("predict", next(tmp_path.glob("work/*/model")), "own/val")
    assert predicted.returncode == 0 and len(predicted.stdout.splitlines()) == 11, predicted.stderr[-2000:]
    lacks = run("distill", "own", "--out", "out")
    assert lacks.returncode == 1 and "which is not installed here: pip install vitdistill" in lacks.stderr


def test_version_is_said_once():
    """settings.ini has it; what other tools want to read for themselves says the same."""
    version = SETTINGS["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version
