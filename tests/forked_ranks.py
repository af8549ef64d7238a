"""Ranks as torchrun starts them, but forked from one process that has imported everything: none starts up anew.

`python tests/forked_ranks.py` reads lines `N FILE`, trains each config on its N ranks, and answers `ok` or `failed`;
what the ranks print goes to stderr. It ends with its input.
"""
import os
import socket
import sys

from vitdistill.train import main


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def train(ranks, file):
    address, children = dict(MASTER_ADDR="localhost", MASTER_PORT=str(free_port())), []
    for rank in range(ranks):
        if not (child := os.fork()):
            mine, all_ranks = str(rank), str(ranks)
            os.environ.update(address, RANK=mine, LOCAL_RANK=mine, WORLD_SIZE=all_ranks, LOCAL_WORLD_SIZE=all_ranks)
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
            os._exit(main(["--config", file]))
        children.append(child)
    return any([os.waitpid(child, 0)[1] for child in children])


if __name__ == "__main__":
    for line in sys.stdin:
        ranks, file = line.rstrip("\n").split(" ", 1)
        print("failed" if train(int(ranks), file) else "ok", flush=True)
