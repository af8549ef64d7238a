"""The documentation site: execute notebooks, lay out the pages, call Sphinx, follow every internal link (`make docs`).

Notebooks are executed once and kept in out/docs-work until they, the package or the records change.
"""
import argparse
import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
WORK, OUT = ROOT / "out/docs-work", ROOT / "out/docs"
REPOSITORY = re.search(r"^git_url = (.*)$", (ROOT / "settings.ini").read_text(), re.M)[1]
EXECUTED = ROOT / "docs/executed"  # copies that are committed: README links to them
# page of the site, without its ending -> the file of the repository that it shows
PAGES = {"recipes": "README.md", "study": "reports/study.md", "contributing": "CONTRIBUTING.md",
         "changes": "CHANGELOG.md"}
for _file in sorted((ROOT / "nbs").glob("*/[ae][0-9]*.ipynb")) + sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
    _part = {"nbs": "chapters"}.get(_file.parent.name, _file.parent.name)
    PAGES[f"{_part}/{_file.stem}"] = _file.relative_to(ROOT).as_posix()


def directives(source):
    """nbdev's directives in a cell: {'export': '', 'eval': 'false'}."""
    found = re.findall(r"^#\| *(\w+)(?:: *(.*)| .*)?$", source, re.M)
    return {name: value.strip() for name, value in found}


def is_run(cell):
    """Is a cell executed, as nbdev_test would?"""
    told = directives(cell.source)
    return told.get("eval") != "false" and not {"slow", "cuda"} & told.keys() and "nbdev_export()" not in cell.source


def as_page(notebook):
    """What a reader sees of a source notebook: hidden cells and lines of directives are gone."""
    shown = []
    for cell in notebook.cells:
        told = directives(cell.source) if cell.cell_type == "code" else {}
        if {"hide", "default_exp"} & told.keys() or "injected-parameters" in cell.metadata.get("tags", []):
            continue
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
        cell.metadata = {}
        if cell.source:
            shown.append(cell)
    notebook.cells = shown
    notebook.metadata.pop("papermill", None)
    return notebook


def without_machine(text):
    """Outputs tell no path of this machine."""
    return text.replace(f"{ROOT}/", "").replace(str(ROOT), ".")


def digest(*files):
    told = hashlib.sha256()
    for file in files:
        told.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return told.hexdigest()[:16]


def execute(name):
    """Execute a source or analysis notebook, unless that is done; returns the executed copy's path."""
    source = ROOT / PAGES[name]
    inputs = [source, *sorted((ROOT / "vitdistill").glob("*.py"))]
    if name.startswith("analysis"):
        inputs += sorted([*(ROOT / "reports").glob("r*/**/*.*"), *source.parent.glob("*.jinja")])
    kept = WORK / "executed" / f"{source.stem}-{digest(*inputs)}.ipynb"
    if kept.is_file():
        return kept
    if name.startswith("analysis"):
        from vitdistill.cli import analysis_parameters, run_notebook

        draft = WORK / "drafts" / source.name
        with redirect_stdout(io.StringIO()):
            run_notebook(source.stem, draft, analysis_parameters(source.stem, "reports/runs", str(WORK / "analysis")))
        notebook = nbformat.read(draft, 4)
    else:
        from nbclient import NotebookClient

        notebook = nbformat.read(source, 4)
        notebook.cells = [cell for cell in notebook.cells if cell.cell_type != "code" or is_run(cell)]
        NotebookClient(notebook, kernel_name="python3", timeout=900, extra_arguments=["--IPKernelApp.log_level=ERROR"],
                       resources={"metadata": {"path": str(source.parent)}}).execute()
    kept.parent.mkdir(parents=True, exist_ok=True)
    for older in kept.parent.glob(f"{source.stem}-*"):
        older.unlink()
    kept.write_text(without_machine(nbformat.writes(notebook)), encoding="utf-8")
    print(f"executed {PAGES[name]}", flush=True)
    return kept


def in_few_colours(picture):
    """A picture of an output, PNG in base64, with a palette, rare colours too: a third of the bytes, kept by git."""
    image, out = Image.open(io.BytesIO(base64.b64decode(picture))), io.BytesIO()
    image.convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def keep(name):
    """Renew a committed copy: the analysis that was executed just now, or the demo's taught student (minutes)."""
    if name.startswith("analysis"):
        notebook = nbformat.read(execute(name), 4)
    else:
        from vitdistill.cli import run_notebook

        draft = WORK / "drafts" / f"{Path(name).name}.ipynb"
        notebook = nbformat.read(run_notebook(draft.stem, draft, {}), 4)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = in_few_colours(output.data["image/png"])
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    EXECUTED.mkdir(exist_ok=True)
    text = json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    text = without_machine(text).replace("](figures/", "](../../reports/figures/")  # as pages of reports/ have them
    (EXECUTED / f"{Path(name).name}.ipynb").write_text(text, encoding="utf-8")


def relink(text, source, page, files):
    """Links of a file of the repository as those of its page: to pages, to copied images, to the repository online."""
    shown = {file: target for target, file in PAGES.items()}
    shown_copies = {f"docs/executed/{Path(file).name}": target for target, file in PAGES.items()}
    up = "../" * page.count("/")

    def link(match):
        bang, label, target = match.groups()
        path, _, fragment = target.partition("#")
        if "://" in target or not path or target.startswith("mailto:"):
            return match[0]
        file = os.path.normpath(os.path.join(os.path.dirname(source), unquote(path)))
        if not (ROOT / file).exists():
            raise SystemExit(f"{source} links to {target}, which is not in the repository: mend the link.")
        known = shown.get(file) or shown_copies.get(file)
        if known:
            return f"{bang}[{label}]({up}{known}{Path(PAGES[known]).suffix}{'#' * bool(fragment)}{fragment})"
        if bang:
            files.add(file)
            return f"{bang}[{label}]({up}{file})"
        return f"{bang}[{label}]({REPOSITORY}/{'tree' if (ROOT / file).is_dir() else 'blob'}/main/{file})"

    return re.sub(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)", link, text)


def lay_out(folder):
    """The pages as Sphinx reads them."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder, ignore=shutil.ignore_patterns("*.py", "_*", "executed"))
    files = {"reports/figures/study_forest.png"}  # of docs/index.md
    for page, source in PAGES.items():
        target = folder / f"{page}{Path(source).suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".md":
            text = relink((ROOT / source).read_text(encoding="utf-8"), source, page, files)
            target.write_text(text, encoding="utf-8")
            continue
        copy = EXECUTED / f"{Path(source).name}"
        if page.startswith(("chapters", "analysis")):
            copy = execute(page)
        notebook = nbformat.read(copy if copy.is_file() else ROOT / source, 4)
        module = re.search(r"^#\| *default_exp (\w+)", "\n".join(cell.source for cell in notebook.cells), re.M)
        notebook = as_page(notebook)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = relink(cell.source, source, page, files)
            for data in (output.get("data", {}) for output in cell.get("outputs", [])):
                if "text/markdown" in data:
                    data["text/markdown"] = relink(data["text/markdown"], "reports/study.md", page, files)
        api = f"Module [`vitdistill.{module[1]}`](../api/{module[1]}.rst). " if module else ""
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


class Links(HTMLParser):
    """What a page links to and loads, and the places in it that can be linked to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.places = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, pairs):
        told = dict(pairs)
        self.places |= {told.get("id"), told.get("name")}
        loaded = told.get("src") or (told.get("href") if tag == "link" and told.get("rel") == "stylesheet" else None)
        if loaded:
            self.loads.append(loaded)
        if told.get("href"):
            self.links.append(told["href"])


def link_faults(folder):
    """Links and files of a built site that lead nowhere, and what it would load from elsewhere."""
    found = [file.resolve() for file in folder.rglob("*.html") if "_static" not in file.parts]
    pages = {file: Links(file.read_text(encoding="utf-8")) for file in found}
    faults = []
    for file, page in pages.items():
        faults += [f"{file.name} loads {url}" for url in page.loads if urlsplit(url).netloc and "badge" not in url]
        for url in page.links + page.loads:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            known = pages[target].places if target in pages else set()
            if not target.is_file() or (parts.fragment and target in pages and unquote(parts.fragment) not in known):
                faults.append(f"{file.relative_to(folder.resolve())} links to {url}, which is not there")
    return faults


def main():
    parser = argparse.ArgumentParser(description="Build the documentation site into out/docs.")
    parser.add_argument("--keep", action="store_true", help="renew docs/executed too: trains the demo's taught student")
    parser.add_argument("--workers", type=int, default=2, help="notebooks at once (default: %(default)s)")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore", PYDEVD_DISABLE_FILE_VALIDATION="1")
    os.chdir(ROOT)
    with ProcessPoolExecutor(args.workers) as pool:
        list(pool.map(execute, [name for name in PAGES if name.startswith(("chapters", "analysis"))]))
    if args.keep:
        keep("analysis/a02_study")
        keep("experiments/e02_distilled_resnet50")
    lay_out(WORK / "source")
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", ROOT / "docs", "-d", WORK / "doctrees"]
    shutil.rmtree(OUT, ignore_errors=True)
    if subprocess.run([*map(str, sphinx), str(WORK / "source"), str(OUT)]).returncode:
        raise SystemExit("the site was built with warnings: mend what is named above.")
    if faults := link_faults(OUT):
        raise SystemExit("\n".join(faults))
    print(f"wrote {OUT.relative_to(ROOT)}/index.html")


if __name__ == "__main__":
    main()
