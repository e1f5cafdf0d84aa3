# Never built: no Docker engine was at hand. The files and options that it names are checked by a test.
#   docker build -f docker/cuda.Dockerfile -t mae-dit:cuda .
# torch's wheels bring CUDA, cuDNN and NCCL; the driver is the host's (NVIDIA container toolkit).
FROM python:3.11-slim-bookworm
# a C compiler: triton builds its launchers with it
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev git && rm -rf /var/lib/apt/lists/*
WORKDIR /mae-dit
COPY pyproject.toml requirements.txt README.md LICENSE ./
RUN pip install --no-cache-dir torch==2.9.1 torchvision==0.24.1
COPY rqvae rqvae
COPY eval eval
COPY gpu_eval gpu_eval
RUN pip install --no-cache-dir '.[hf,remote,play]'
COPY configs configs
COPY train_stage1.sh train_stage1woeval.sh train_stage2.sh recon_stage1.sh ./
ENV RQVAE_BACKEND=cuda NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENTRYPOINT ["python", "-m", "rqvae"]
CMD ["--help"]
