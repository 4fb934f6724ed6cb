# ddpm for machines with NVIDIA GPUs and the NVIDIA Container Toolkit. PyPI's PyTorch for Linux brings CUDA.
#
#     docker build -t ddpm .
#     docker run --rm -it --init --gpus all -v "$PWD:/data" ddpm train images
#     docker run --rm --init --gpus all --ipc host -v "$PWD:/data" --entrypoint torchrun ddpm \
#         --nproc-per-node gpu -m ddpm_cli train images --resume
#
# Not built yet. docker stop -t 120 leaves a run the time to save a checkpoint.
FROM python:3.13-slim

# a compiler, for --compile
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt ./
# in a layer of its own, so that a change of ddpm does not download gigabytes again
RUN pip install --no-cache-dir -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir -c constraints.txt ".[datasets,tensorboard]"

# Runs, pictures and the cache are in the folder that is mounted here, also for a user without a home (docker run -u).
WORKDIR /data
ENV XDG_CACHE_HOME=/data/.cache
ENTRYPOINT ["ddpm"]
