"""A hub on this machine that answers huggingface_hub's own requests: what is pushed is what comes back by
name."""
import base64
import hashlib
import http.server
import json
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from conftest import environment
from vitdistill.config import save
from vitdistill.runs import find_runs


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories as dicts of files, and each request that came."""
    repositories, requests = {}, []

    def log_message(self, *_):
        pass

    def address(self):
        return f"http://{self.headers['Host']}"

    def answer(self, body=b"", status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in dict(headers, **{"Content-Length": len(body)}).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_one(self):
        body, path = self.read(), self.path.split("?")[0]
        self.requests.append((self.command, path))
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(name, {})
            return self.answer(dict(url=f"{self.address()}/{name}", name=name))
        if path == "/api/validate-yaml":
            return self.answer(dict(errors=[], warnings=[]))
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if name not in self.repositories:
            return self.answer(status=404, X_Error_Code="RepoNotFound")
        files, rest = self.repositories[name], path.split(name, 1)[1]
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        if rest.startswith("/preupload/"):
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = dict(uploadMode="regular", shouldIgnore=False, oid=None)
            return self.answer(dict(files=[dict(path=path, **modes) for path in asked]))
        if rest.startswith("/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.address()}/{name}/commit/{commit}"
            return self.answer(dict(success=True, commitOid=commit, commitUrl=url))
        if rest.startswith("/tree/"):
            about = [dict(type="file", path=path, size=len(file), oid=hashlib.sha1(file).hexdigest())
                     for path, file in files.items()]
            return self.answer(about)
        if rest.startswith("/resolve/"):
            file = files[rest.split("/", 3)[3]]
            about = dict(X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(file).hexdigest()}"')
            return self.answer(file, **about)
        siblings = [dict(rfilename=file) for file in files]
        return self.answer(dict(id=name, modelId=name, sha=commit, siblings=siblings, tags=[], private=False))

    do_GET = do_HEAD = do_POST = handle_one


@pytest.fixture
def hub(tmp_path):
    """(the hub, the environment of processes that talk to it)."""
    Hub.repositories, Hub.requests = {}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    here = dict(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1",
                HF_ENDPOINT=address, HF_TOKEN="hf_made_up", HF_HOME=str(tmp_path / "hf"),
                HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_TELEMETRY="1")
    yield Hub, {name: value for name, value in environment().items() if name != "HF_HUB_OFFLINE"} | here
    server.shutdown()


SCRIPT = """
import sys
from vitdistill.base import VitdistillError
from vitdistill.config import load
from vitdistill.train.loop import train
teacher, student, nowhere = map(load, sys.argv[1:])
train(teacher)
train(student)
try: train(nowhere)
except VitdistillError as e: print('refused:', e)
unwanted = {'tensorboard', 'trackio', 'onnx', 'onnxruntime', 'submitit', 'papermill', 'seaborn'}
print('imported', *unwanted & {*sys.modules})
"""


def test_a_teacher_goes_round(hub, tiny, tmp_path):
    """A run pushes its model, and a student names it as its teacher."""
    there, env = hub
    plain = dict(distillation="none", teacher="", teacher_kwargs={}, epochs=1)
    teacher = replace(tiny, experiment="teacher", hub_repo="me/vit", **plain)
    student = replace(tiny, epochs=1, teacher_weights="hf-hub:me/vit")
    nowhere = replace(tiny, teacher_weights="hf-hub:me/nothing", runs_dir=str(tmp_path / "nowhere"))
    configs = teacher, student, nowhere
    files = [str(save(config, tmp_path / f"{n}.yaml")) for n, config in enumerate(configs)]
    (tmp_path / ".vitdistill").touch()  # the root of all
    ran = subprocess.run([sys.executable, "-c", SCRIPT, *files], cwd=tmp_path, env=env, capture_output=True,
                         text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "refused: hf-hub:me/nothing could not be fetched (there is no such repository, or it" in ran.stdout
    assert not (tmp_path / "nowhere").exists() and "imported\n" in ran.stdout  # what a run needs, and no more
    shared = there.repositories["me/vit"]
    assert shared.keys() == {"model.safetensors", "config.json", "card.json", "README.md"}
    assert b"teacher_weights: hf-hub:me/vit" in shared["README.md"]
    assert b"license: apache-2.0" in shared["README.md"]
    taught, = (run for run in find_runs(student.runs_dir) if run.config.distillation == "hard")
    assert taught.config.teacher_weights == "hf-hub:me/vit"
    card = json.loads(shared["card.json"])
    assert taught.result["teacher_card"]["weights_hash"] == card["weights_hash"]
    asked = [path for _, path in there.requests]
    assert asked.count("/api/models/me/vit/commit/main") == 1
    assert asked.count("/api/models/me/vit/revision/main") >= 1
