# Never built: no Docker engine was at hand. The files and options that it names are checked by a test.
#   docker build -f docker/hpu.Dockerfile -t mae-dit:hpu .
# Gaudi's torch (2.7.1 with its plugin) is in no package index, only in the vendor's image: nothing may replace it.
FROM vault.habana.ai/gaudi-docker/1.22.0/ubuntu22.04/habanalabs/pytorch-installer-2.7.1:latest
WORKDIR /mae-dit
COPY pyproject.toml requirements.txt README.md LICENSE ./
# what the image has stays, by constraint; torch_xla, which wants torch 2.9, is left out
RUN pip list --format=freeze | grep -E '^(torch|torchvision|numpy)==' > /tmp/vendor.txt; \
    grep -v -E '^(torch|torchvision|torch_xla)[>=]' requirements.txt > /tmp/ours.txt && \
    pip install --no-cache-dir -r /tmp/ours.txt -c /tmp/vendor.txt
COPY rqvae rqvae
COPY eval eval
COPY gpu_eval gpu_eval
RUN pip install --no-cache-dir --no-deps .
COPY configs configs
COPY train_stage1.sh train_stage1woeval.sh train_stage2.sh recon_stage1.sh ./
ENV RQVAE_BACKEND=hpu PT_HPU_LAZY_MODE=0
ENTRYPOINT ["python", "-m", "rqvae"]
CMD ["--help"]
