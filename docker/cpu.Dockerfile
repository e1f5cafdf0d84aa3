# Never built: no Docker engine was at hand. The files and options that it names are checked by a test.
#   docker build -f docker/cpu.Dockerfile -t mae-dit:cpu .
FROM python:3.11-slim-bookworm
# a C++ compiler: torch.compile writes code for the host
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /mae-dit
# torch without CUDA's libraries, 5 GB less; torch_xla of the same version comes with the requirements
RUN pip install --no-cache-dir torch==2.9.1 torchvision==0.24.1 --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml requirements.txt README.md LICENSE ./
COPY rqvae rqvae
COPY eval eval
COPY gpu_eval gpu_eval
RUN pip install --no-cache-dir '.[hf,remote,play]'
COPY configs configs
COPY train_stage1.sh train_stage1woeval.sh train_stage2.sh recon_stage1.sh ./
ENV RQVAE_BACKEND=cpu OMP_WAIT_POLICY=PASSIVE
ENTRYPOINT ["python", "-m", "rqvae"]
CMD ["--help"]
