# A CPU:   docker build -t vitdistill .
# A GPU:   docker build -t vitdistill --build-arg BASE=pytorch/pytorch:2.11.0-cuda12.8-cudnn9-runtime .   (any image with Python, torch, torchvision)
# Run it:  docker run --rm -it -v "$PWD:/work" vitdistill demo        (a GPU: --gpus all --shm-size 8g)
ARG BASE=python:3.12-slim
FROM ${BASE}

RUN apt-get update \
 && apt-get install -y --no-install-recommends git make \
 && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore
# torch without CUDA, as tested (settings.ini says which), where the base image has none
COPY settings.ini /tmp/
RUN python -c "import torch, torchvision" 2>/dev/null \
 || python -m pip install $(grep -oE '\btorch(vision)?==[0-9.]+' /tmp/settings.ini) --index-url https://download.pytorch.org/whl/cpu

COPY . /opt/vitdistill
RUN python -m pip install "/opt/vitdistill[notebooks]"

WORKDIR /work
ENTRYPOINT ["vitdistill"]
CMD ["--help"]
