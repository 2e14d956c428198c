# docker build -t higgs-trainer . && docker run --gpus all --ipc host -v "$PWD:/data" -v ~/.cache/huggingface:/cache \
#     higgs-trainer voice /data/recording.m4a --name myvoice --out /data/voices/myvoice
#
# PyTorch brings CUDA with it: the machine needs NVIDIA's driver and its container toolkit.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends ffmpeg && rm -rf /var/lib/apt/lists/*
WORKDIR /trainer
ENV VENV=/venv PIP_NO_CACHE_DIR=1 HF_HOME=/cache NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY launch.sh requirements*.txt requirements.lock ./
RUN bash launch.sh setup
COPY . .
WORKDIR /data
ENTRYPOINT ["bash", "/trainer/launch.sh"]
