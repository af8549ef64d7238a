"""Takes README's picture of JupyterLab: python docs/lab.py

Runs e02 on the digits, opens it in JupyterLab, and lets headless Chromium take the picture (`apt-get install
chromium`). A test compares the cells that the picture shows with those of today.
"""
import base64
import hashlib
import io
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "nbs/experiments/e02_distilled_resnet50.ipynb"
PICTURE = ROOT / "docs/_static/jupyterlab.png"
SHOWN = "run(config"  # the picture begins with the cell that trains
BROWSERS = "chromium", "chromium-browser", "google-chrome"


def shown_cells():
    """Returns the hash of the code that the picture shows."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    sources = itertools.dropwhile(lambda source: SHOWN not in source, sources)
    return hashlib.sha256("\n\n".join(sources).encode()).hexdigest()


def wait_for(answer, seconds=120):
    """Returns the first true answer of a function that may fail at first."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := answer():
                return found
        except OSError:
            pass
        time.sleep(1)
    raise SystemExit(f"no answer within {seconds} seconds")


class Page:
    """A page of a browser, driven by Chromium's DevTools protocol."""

    def __init__(self, port, address):
        import websocket  # comes with JupyterLab

        place = f"http://127.0.0.1:{port}/json/new?{address}"
        opened = json.load(urllib.request.urlopen(urllib.request.Request(place, method="PUT")))
        self.socket = websocket.create_connection(opened["webSocketDebuggerUrl"], suppress_origin=True)
        self.numbers = itertools.count(1)

    def call(self, method, **given):
        number = next(self.numbers)
        self.socket.send(json.dumps(dict(id=number, method=method, params=given)))
        while (answer := json.loads(self.socket.recv())).get("id") != number:
            pass  # an event
        return answer["result"]

    def evaluate(self, script):
        return self.call("Runtime.evaluate", expression=script)["result"].get("value")


def free_port():
    """Returns the number of a port that nobody uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def port_of(folder):
    """Returns the port that a browser wrote into its folder."""
    return int((folder / "DevToolsActivePort").read_text().split()[0])


def take(lab_port, browser_port):
    """Returns the picture of the notebook in JupyterLab as a PNG."""
    page = Page(browser_port, f"http://127.0.0.1:{lab_port}/lab/tree/{NOTEBOOK.name}?reset")
    page.call("Emulation.setDeviceMetricsOverride", width=1100, height=860, deviceScaleFactor=1, mobile=False)
    wait_for(lambda: page.evaluate("document.querySelectorAll('.jp-OutputArea-output img').length > 1"))
    page.evaluate("document.querySelectorAll('.jp-toast, .Toastify__toast').forEach(it => it.remove())")
    page.evaluate(f"""[...document.querySelectorAll('.jp-CodeCell')].find(cell =>
        cell.querySelector('.jp-InputArea').textContent.includes({SHOWN!r})).scrollIntoView()""")
    time.sleep(3)
    return base64.b64decode(page.call("Page.captureScreenshot", format="png")["data"])


def execute(notebook, folder, **given):
    """Executes e02 as JupyterLab does, which draws curves where papermill prints lines."""
    given |= dict(runs_dir=folder / "runs", work_dir=folder / "work")
    words = [str(word) for name, value in given.items() for word in ("-p", name, value)]
    command = [sys.executable, "-m", "papermill", NOTEBOOK, notebook, "--cwd", ROOT, *words]
    subprocess.run(command, check=True, env=os.environ | {"JPY_SESSION_NAME": NOTEBOOK.name})


def main():
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        sys.exit("no Chromium here: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        executed = folder / "notebooks" / NOTEBOOK.name
        executed.parent.mkdir()
        execute(folder / "first.ipynb", folder, seed=2, epochs=1)  # trains the teacher
        execute(executed, folder, seed=1)
        settings = folder / "settings/@jupyterlab/notebook-extension"
        settings.mkdir(parents=True)
        (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
        environment = os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
        port = free_port()
        lab = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
               "--IdentityProvider.token=", f"--port={port}", "--notebook-dir", executed.parent]
        chromium = [browser, "--headless=new", "--no-sandbox", "--hide-scrollbars",
                    "--remote-debugging-port=0", f"--user-data-dir={folder / 'browser'}"]
        with subprocess.Popen(lab, env=environment) as server, subprocess.Popen(chromium) as window:
            try:
                browser_port = wait_for(lambda: port_of(folder / "browser"))
                wait_for(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/api"))
                picture = take(port, browser_port)
            finally:
                window.terminate()
                server.terminate()
    about = PngInfo()
    about.add_text("cells", shown_cells())
    image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(64)
    image.save(PICTURE, pnginfo=about, optimize=True)
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
