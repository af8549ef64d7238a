"""Analysis notebooks with papermill's parameters, each in a fork of a process that has imported what they import."""
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
from execnb.shell import CaptureShell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from vitdistill.config import repo_root

ROOT = repo_root(Path(__file__).parent)
FORKED = multiprocessing.get_context("forkserver")  # to start a kernel and import torch takes longer than most runs
FORKED.set_forkserver_preload(["execnb.shell", "papermill", "seaborn", "timm", "vitdistill.bench.attention",
                               "vitdistill.study.captions", "vitdistill.study.deit", "vitdistill.study.findings"])
POOL = ProcessPoolExecutor(1, mp_context=FORKED, max_tasks_per_child=1)


def run(notebook, output, parameters):
    """Write the executed notebook; an error in a cell is raised."""
    os.chdir(ROOT)
    nbformat.write(parameterize_notebook(load_notebook_node(str(notebook)), parameters), output)
    CaptureShell(mpl_format="png").execute(output, output, exc_stop=True)


def analyse(name, output, **parameters):
    """The executed notebook of nbs/analysis, as JSON."""
    POOL.submit(run, ROOT / f"nbs/analysis/{name}.ipynb", output, parameters).result()
    return json.loads(output.read_text())
