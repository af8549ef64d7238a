"""`python tests/forked.py ARGUMENTS` is `python ARGUMENTS`, but the processes that it starts are forks of
this one.

This one has imported torch, timm and other libraries, which takes a new process five seconds; each fork
imports the package. `sys.executable` of a fork is a script that sends its arguments, folder, environment and
standard streams here, passes signals on, and ends with its fork. That the package forgets to import such a
library does not show in a fork. `python -c CODE` is a new process; so is conftest.PYTHON, for tests that
kill. Outside Linux nothing is forked.
"""
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from pathlib import Path

IMPORTED = ("ipykernel.zmqshell ipywidgets papermill scipy.stats seaborn sklearn.datasets sklearn.metrics "
            "timm torch._dynamo torch.distributed.run torchvision.transforms.v2").split()
READ_AT_IMPORT = "PYTHONPATH", "HF_", "ATEN_", "ONEDNN_", "TMPDIR"  # one differs: a new process starts
SCRIPT = """#!/bin/sh
'''exec' "{python}" -IS "$0" "$@"
' '''
import json, os, signal, socket, sys
if sys.argv[1][0] == '-' and sys.argv[1] not in ('-m', '-u', '-P'):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
parent, status, server = os.getppid(), None, socket.socket(socket.AF_UNIX)
server.connect({place!r})
asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(asked).to_bytes(8, 'big')], [0, 1, 2])
server.sendall(asked)
for number in signal.SIGHUP, signal.SIGINT, signal.SIGTERM:
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
server.settimeout(1)
while status is None:
    try:
        status = int(server.recv(9) or 255)
    except TimeoutError:
        if os.getppid() != parent:  # the fork can't see that its launcher has ended
            os._exit(3)
if status >= 0:
    os._exit(status)
if -status != signal.SIGKILL:
    signal.signal(-status, signal.SIG_DFL)
os.kill(os.getpid(), -status)
"""


def leave_the_hub():
    """No test depends on what a hub answers, or on what lies in a cache: before huggingface_hub is
    imported."""
    own = os.path.join(tempfile.gettempdir(), f"vitdistill-tests-hub-{os.getuid()}")
    os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=own)
    os.environ.pop("HF_HUB_CACHE", None)


def free_port(cache, ip):
    """A port for a kernel that no other process picks: jupyter_client frees it before the kernel binds it."""
    first = 10_000 + 50 * (os.getpid() % 400)
    for port in set(range(first, first + 50)) - cache.currently_used_ports:
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind((ip, port))
            cache.currently_used_ports.add(port)
            return port
    raise OSError(f"no port from {first} to {first + 49} is free")


def serve(arguments, environment):
    """Ends as `python ARGUMENTS` does; in each fork, returns the arguments that a script has sent."""
    folder = Path(tempfile.mkdtemp(prefix="forked-"))
    python, place, forks = folder / "python", str(folder / "socket"), []
    python.write_text(SCRIPT.format(python=sys.executable, place=place))
    python.chmod(0o700)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen(64)
    first = subprocess.Popen([python, *arguments], env=environment | dict(VITDISTILL_PYTHON=sys.executable))
    ended = os.pidfd_open(first.pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process gets it too, and decides
    signal.signal(signal.SIGTERM, lambda number, frame: first.send_signal(number))
    while ended not in select.select([listener, ended], [], [])[0]:
        script = listener.accept()[0]
        forks = [child for child in forks if not os.waitpid(child, os.WNOHANG)[0]]
        if not (child := os.fork()):
            listener.close()
            os.close(ended)
            return become(script, python)
        forks.append(child)
        script.close()
    for child in forks:  # what an interrupted test has left
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    shutil.rmtree(folder)
    status = first.wait()
    os._exit(status if status >= 0 else 128 - status)


def become(script, python):
    """In a child of this fork, returns the script's arguments, with its folder, environment and streams."""
    os.setsid()
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
    size, streams, *_ = socket.recv_fds(script, 8, 3)
    words, folder, environment = json.loads(script.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    if child := os.fork():
        watch(script, child)
    script.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    if any(name.startswith(READ_AT_IMPORT) for name, _ in os.environ.items() ^ environment.items()):
        os.execve(sys.executable, [sys.executable, *words], environment)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = str(python)
    return words


def watch(script, child):
    """Passes the script's signals on to the child and ends after it; kills the child if the script ends
    first."""
    ended, received = os.pidfd_open(child), True
    while received and ended not in select.select([script, ended], [], [])[0]:
        received = script.recv(1)
        os.kill(child, received[0] if received else signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        script.sendall(str(status).encode())
    os._exit(0)


def run(words):
    """What `python WORDS` runs: a module, a file, or the code of an xdist worker, which comes as `-u -c
    CODE`."""
    for number, name in enumerate(["stdin", "stdout", "stderr"]):  # written line by line, as with -u
        setattr(sys, name, open(number, "w" if number else "r", 1, errors="backslashreplace", closefd=False))
        setattr(sys, f"__{name}__", getattr(sys, name))
    while words[0] in ("-u", "-P"):
        words = words[1:]
    kind, target = words[:2] if words[0].startswith("-") else ("", words[0])
    sys.argv = [kind or target, *words[1 + bool(kind):]]
    sys.path[0] = os.getcwd() if kind else str(Path(target).resolve().parent)
    if target == "ipykernel_launcher":  # the launcher sets what matplotlib reads at import
        sys.modules["matplotlib"].rcParams["backend"] = "module://matplotlib_inline.backend_inline"
    if kind == "-m":
        warnings.filterwarnings("ignore", ".*found in sys.modules", module="runpy")
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(target, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(target, run_name="__main__")


def status_of(words):
    """The exit status after `run`; errors are printed."""
    try:
        run(words)
    except SystemExit as end:
        if isinstance(end.code, int | None):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    if sys.platform != "linux":
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    if "pytest" in sys.argv:  # as conftest.py does, so that what a test starts is a fork
        leave_the_hub()
    given = dict(os.environ)  # imports add to it
    for name in IMPORTED:
        importlib.import_module(name)
    sys.modules["jupyter_client.connect"].LocalPortCache.find_available_port = free_port
    gc.freeze()
    status = status_of(serve(sys.argv[1:], given))
    threading._shutdown()  # as an interpreter ends, but without a last look at each object: 2 seconds
    atexit._run_exitfuncs()
    for stream in sys.__stdout__, sys.__stderr__:
        with contextlib.suppress(ValueError):  # closed
            stream.flush()
    os._exit(status & 255)
