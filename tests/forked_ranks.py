"""Ranks as torchrun starts them, but forked from one process that has imported everything: none starts up anew.

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
            mine, all_ranks = str(rank), str(ranks)
            os.environ.update(address, RANK=mine, LOCAL_RANK=mine, WORLD_SIZE=all_ranks, LOCAL_WORLD_SIZE=all_ranks)
            os._exit(main(["--config", file]))
        children.append(child)
    return any([os.waitpid(child, 0)[1] for child in children])


if __name__ == "__main__":
    for ranks, file in zip(sys.argv[1::2], sys.argv[2::2]):
        if train(int(ranks), file):
            sys.exit(f"{ranks} ranks of {file} failed")
