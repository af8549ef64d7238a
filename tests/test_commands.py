"""What a user types: where paths start, what --help costs, what a dry run leaves behind."""
import os
import subprocess
import sys

import pytest
import timm
from PIL import Image

from vitdistill import api
from vitdistill.cli import COMMANDS, main

HELPS = """
import sys
from vitdistill.cli import COMMANDS, main
for name in sys.argv[1:]:
    try:
        main([name, '--help'])
    except SystemExit as end:
        assert end.code == 0, name
assert not {'torch', 'timm', 'pandas', 'matplotlib'} & sys.modules.keys()
"""


def test_help_needs_no_torch():
    """Every command explains its options without the libraries that take seconds to import."""
    names = [*COMMANDS]
    done = subprocess.run([sys.executable, "-c", HELPS, *names], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--teacher-size" in done.stdout and "--gpus-per-node" in done.stdout
    assert not [word for word in done.stdout.split() if word.startswith("--") and "_" in word]


def test_the_help_is_whole_without_docstrings():
    """PYTHONOPTIMIZE=2 takes them away, as some images of containers do."""
    helps = []
    for level in ("", "2"):
        command = [sys.executable, "-m", "vitdistill", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60,
                              env=os.environ | {"PYTHONOPTIMIZE": level})
        assert done.returncode == 0, done.stderr[-2000:]
        helps.append(done.stdout)
    assert helps[0] == helps[1] and "image" in helps[1]
    code = "import sys; from vitdistill.cli import main; main(sys.argv[1:])"
    for name in "figures", "report":  # whose own help begins with that sentence
        command = [sys.executable, "-OO", "-c", code, name, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        sentence = done.stdout.split("\n\n")[1].replace("\n", " ").lower()
        assert sentence.rstrip(".") in " ".join(helps[0].lower().split()), sentence


def test_comparing_needs_no_torch():
    """Who looks at runs does not wait for the libraries that train."""
    code = "import sys, vitdistill.study.compare, vitdistill.study.page; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not {"torch", "timm", "papermill"} & {*done.stdout.split()}


@pytest.fixture
def photos(tmp_path):
    """Two classes of ten images, as a user has them."""
    for label, name in enumerate(["bird", "cat"]):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (32, 32), (100 * label + i, 0, 0)).save(folder / f"{i}.png")
    return tmp_path / "photos"


def tree(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def small(known_speed, tmp_path):
    """Options of a job of two small models, whose speed is known."""
    tiny = dict(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5, **tiny)
    weights = api.save(vit, tmp_path / "vit", list("abcde"), 32, ((0.5,) * 3, (0.5,) * 3), **tiny)
    return ["--teacher", str(weights), "--student", "resnet10t", "--student-pretrained", "False"]


def test_a_dry_run_leaves_nothing_behind(photos, small, capsys, monkeypatch):
    """Neither links to images nor a folder; of a grid neither."""
    monkeypatch.chdir(photos.parent)
    study = photos.parent / "one.yaml"
    study.write_text("arms: {plain: {notebook: e01_baseline_resnet50}}")
    before = tree(photos.parent)
    assert main(["distill", "photos", "--out", "job", "--dry-run", *small]) == 0
    assert f"{photos}: 2 classes" in capsys.readouterr().out
    assert main(["grid", "one.yaml", "--out", "batches", "--dry-run"]) == 0
    assert tree(photos.parent) == before


def test_a_typed_path_starts_at_the_working_folder(photos, small, monkeypatch, capsys):
    """Also where a folder of `vitdistill new`, or another program's settings.ini, lies above."""
    root = photos.parent
    (root / ".vitdistill").touch()
    (inner := root / "notes").mkdir()
    (inner / "settings.ini").write_text("[settings]\n")
    monkeypatch.chdir(inner)
    assert main(["distill", "../photos", "--out", "job", "--dry-run", *small]) == 0
    assert f"{photos}: 2 classes" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=f"no folder {inner}/photos"):
        main(["distill", "photos", "--dry-run", *small])
    with pytest.raises(SystemExit, match="data_root = .* is set by the job itself: name the"):
        main(["distill", "../photos", "--data-root", "elsewhere", "--dry-run", *small])
    assert {path.name for path in root.iterdir()} == {".vitdistill", "notes", "photos", "vit"}
