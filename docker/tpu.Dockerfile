# Never built: no Docker engine was at hand. The files and options that it names are checked by a test.
#   docker build -f docker/tpu.Dockerfile -t mae-dit:tpu .
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends git libgomp1 && rm -rf /var/lib/apt/lists/*
WORKDIR /mae-dit
RUN pip install --no-cache-dir torch==2.9.1 torchvision==0.24.1 --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml requirements.txt README.md LICENSE ./
COPY rqvae rqvae
COPY eval eval
COPY gpu_eval gpu_eval
# the extra brings libtpu, of the version that torch_xla asks for
RUN pip install --no-cache-dir '.[tpu,hf,remote]' -f https://storage.googleapis.com/libtpu-releases/index.html
COPY configs configs
COPY train_stage1.sh train_stage1woeval.sh train_stage2.sh recon_stage1.sh ./
ENV RQVAE_BACKEND=xla PJRT_DEVICE=TPU RQVAE_XLA_CACHE=/tmp/xla_cache
ENTRYPOINT ["python", "-m", "rqvae"]
CMD ["--help"]
