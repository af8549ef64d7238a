# Build for a CPU:  docker build -t vitdistill .
# Build for a GPU:  docker build -t vitdistill --build-arg BASE=pytorch/pytorch:2.11.0-cuda12.8-cudnn9-runtime .
#                   (any base image works that has Python, torch and torchvision)
# Run on a CPU:     docker run --rm -it -v "$PWD:/work" vitdistill demo
# Run on a GPU:     docker run --rm -it -v "$PWD:/work" --gpus all --shm-size 8g vitdistill demo
ARG BASE=python:3.12-slim
FROM ${BASE}

RUN apt-get update \
 && apt-get install -y --no-install-recommends git make \
 && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore
# If the base image has no torch, install the tested version (from settings.ini) without CUDA.
COPY settings.ini /tmp/
RUN python -c "import torch, torchvision" 2>/dev/null \
 || python -m pip install $(grep -oE '\btorch(vision)?==[0-9.]+' /tmp/settings.ini) --index-url https://download.pytorch.org/whl/cpu

COPY . /opt/vitdistill
RUN python -m pip install /opt/vitdistill

WORKDIR /work
ENTRYPOINT ["vitdistill"]
CMD ["--help"]
