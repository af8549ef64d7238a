"""Builds the documentation site: executes notebooks, lays out pages, calls Sphinx, checks what they load
(`make docs`).

Analysis notebooks are shown as committed, with their outputs. Executed ones are kept in out/docs-work until
they or the package change.
"""
import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat

ROOT = Path(__file__).resolve().parents[1]
WORK, OUT = ROOT / "out/docs-work", ROOT / "out/docs"
REPOSITORY = re.search(r"^git_url = (.*)$", (ROOT / "settings.ini").read_text(), re.M)[1]
# page of the site, without its ending -> the file of the repository that it shows
PAGES = {"start": "README.md", "study": "reports/study.md", "contributing": "CONTRIBUTING.md",
         "changes": "CHANGELOG.md"}
PAGES |= {name: f"docs/{name}.md" for name in ("recipes", "gpus", "library", "costs", "trouble", "compare",
                                               "extend")}
for _file in sorted((ROOT / "reports").glob("*.md")):
    if _file.stem != "study":
        PAGES[f"studies/{_file.stem}"] = _file.relative_to(ROOT).as_posix()
_templates = {f"{_file.parent.name}/{_file.stem}": _file
              for _file in (ROOT / "nbs").glob("*/[ae][0-9]*.ipynb")}
_modules = {f"chapters/{_file.relative_to(ROOT / 'nbs').with_suffix('').as_posix()}": _file
            for pattern in ("[0-9]*.ipynb", "[a-z]*/[0-9]*.ipynb") for _file in (ROOT / "nbs").glob(pattern)}
PAGES |= {name: file.relative_to(ROOT).as_posix() for name, file in sorted((_templates | _modules).items())}


def directives(source):
    """Returns nbdev's directives of a cell, such as {'export': '', 'eval': 'false'}."""
    found = re.findall(r"^#\| *(\w+)(?:: *(.*)| .*)?$", source, re.M)
    return {name: value.strip() for name, value in found}


def is_run(cell):
    """Returns whether nbdev_test would execute a cell."""
    given = directives(cell.source)
    if given.get("eval") == "false" or {"slow", "cuda"} & given.keys():
        return False
    return "nbdev_export()" not in cell.source


def as_page(notebook):
    """Returns a source notebook without hidden cells and without lines of directives."""
    shown = []
    for cell in notebook.cells:
        given = directives(cell.source) if cell.cell_type == "code" else {}
        if {"hide", "default_exp"} & given.keys():
            continue
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
        cell.metadata = {}
        if cell.source:
            shown.append(cell)
    notebook.cells = shown
    return notebook


def execute(name):
    """Executes a source notebook, unless that was done before, and returns the path of the copy."""
    source = ROOT / PAGES[name]
    inputs = [source, *sorted((ROOT / "vitdistill").rglob("*.py"))]
    state = b"".join(file.relative_to(ROOT).as_posix().encode() + file.read_bytes() for file in inputs)
    stem = name.replace("/", "-")
    kept = WORK / "executed" / f"{stem}-{hashlib.sha256(state).hexdigest()[:16]}.ipynb"
    if kept.is_file():
        return kept
    from nbclient import NotebookClient

    notebook = nbformat.read(source, 4)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type != "code" or is_run(cell)]
    NotebookClient(notebook, kernel_name="python3", timeout=900,
                   extra_arguments=["--IPKernelApp.log_level=ERROR"],
                   resources={"metadata": {"path": str(source.parent)}}).execute()
    kept.parent.mkdir(parents=True, exist_ok=True)
    for older in kept.parent.glob(f"{stem}-*"):
        older.unlink()
    text = nbformat.writes(notebook).replace(f"{ROOT}/", "").replace(str(ROOT), ".")  # no paths of a machine
    kept.write_text(text, encoding="utf-8")
    print(f"executed {PAGES[name]}", flush=True)
    return kept


def relink(text, source, page, files):
    """Returns the text of a file with links to pages of the site, to copied images and to the repository
    online."""
    shown = {file: target for target, file in PAGES.items()}
    up = "../" * page.count("/")

    def link(match):
        bang, label, target = match.groups()
        path, _, fragment = target.partition("#")
        place = f"#{fragment}" if fragment else ""
        if "://" in target or not path or target.startswith("mailto:"):
            return match[0]
        file = os.path.normpath(os.path.join(os.path.dirname(source), unquote(path)))
        if not (ROOT / file).exists():
            raise SystemExit(f"{source} links to {target}, which is not in the repository: mend the link.")
        if known := shown.get(file):
            return f"{bang}[{label}]({up}{known}{Path(file).suffix}{place})"
        if bang:
            files.add(file)
            return f"{bang}[{label}]({up}{file})"
        kind = "tree" if (ROOT / file).is_dir() else "blob"
        return f"{bang}[{label}]({REPOSITORY}/{kind}/main/{file}{place})"

    return re.sub(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)", link, text)


def lay_out(folder):
    """Writes the pages as Sphinx reads them."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder, ignore=shutil.ignore_patterns("*.py", "_*"))
    files = {"reports/figures/answer.svg"}  # the picture of docs/index.md
    for page, source in PAGES.items():
        target = folder / f"{page}{Path(source).suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".md":
            text = relink((ROOT / source).read_text(encoding="utf-8"), source, page, files)
            target.write_text(text, encoding="utf-8")
            continue
        notebook = nbformat.read(execute(page) if page.startswith("chapters") else ROOT / source, 4)
        code = "\n".join(cell.source for cell in notebook.cells)
        module = re.search(r"^#\| *default_exp ([\w.]+)", code, re.M)
        notebook = as_page(notebook)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = relink(cell.source, source, page, files)
        api = ""
        if module:
            api = f"Module [`vitdistill.{module[1]}`]({'../' * page.count('/')}api/{module[1]}.rst). "
        notebook.cells[0].source += f"\n\n{api}Source: [{source}]({REPOSITORY}/blob/main/{source})."
        target.write_text(nbformat.writes(notebook), encoding="utf-8")
        if module:
            title = f"vitdistill.{module[1]}"
            text = f"{title}\n{'=' * len(title)}\n\n.. automodule:: {title}\n"
            (folder / "api").mkdir(exist_ok=True)
            (folder / "api" / f"{module[1]}.rst").write_text(text)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)


class Loads(HTMLParser):
    """Collects what a page loads: scripts, pictures and styles."""

    def __init__(self, text):
        super().__init__()
        self.urls = []
        self.feed(text)

    def handle_starttag(self, tag, pairs):
        given = dict(pairs)
        style = given.get("href") if tag == "link" and given.get("rel") == "stylesheet" else None
        self.urls += filter(None, [given.get("src"), style])


def foreign_loads(folder):
    """Returns what a built site would load from another site; Sphinx checks its links."""
    pages = [file for file in folder.rglob("*.html") if "_static" not in file.parts]
    wrong = []
    for file in pages:
        for url in Loads(file.read_text(encoding="utf-8")).urls:
            if urlsplit(url).netloc and "badge" not in url:
                wrong.append(f"{file.name} loads {url}")
    return wrong


def main():
    parser = argparse.ArgumentParser(description="Build the documentation site into out/docs.")
    parser.add_argument("--workers", type=int, default=2, help="notebooks at once (default: %(default)s)")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore", PYDEVD_DISABLE_FILE_VALIDATION="1")
    os.chdir(ROOT)
    with ProcessPoolExecutor(args.workers) as pool:
        list(pool.map(execute, [name for name in PAGES if name.startswith("chapters")]))
    lay_out(WORK / "source")
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", ROOT / "docs"]
    sphinx += ["-d", WORK / "doctrees"]
    shutil.rmtree(OUT, ignore_errors=True)
    if subprocess.run([*map(str, sphinx), str(WORK / "source"), str(OUT)]).returncode:
        raise SystemExit("the site was built with warnings: mend what is named above.")
    if faults := foreign_loads(OUT):
        raise SystemExit("\n".join(faults))
    print(f"wrote {OUT.relative_to(ROOT)}/index.html")


if __name__ == "__main__":
    main()
