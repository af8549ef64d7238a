"""Ranks as torchrun starts them, but forked from one process that has imported everything, which saves each rank's start-up.

`python tests/forked_ranks.py N FILE [N FILE ...]` trains each config on its N ranks, one config after the other.
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
            os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
            os._exit(main(["--config", file]))
        children.append(child)
    return any([os.waitpid(child, 0)[1] for child in children])


if __name__ == "__main__":
    for ranks, file in zip(sys.argv[1::2], sys.argv[2::2]):
        if train(int(ranks), file):
            sys.exit(f"{ranks} ranks of {file} failed")
