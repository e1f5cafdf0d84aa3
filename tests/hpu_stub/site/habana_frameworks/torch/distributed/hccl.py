"""Importing it registers the collective library, which is gloo here."""

import os

import torch.distributed as dist

from tests.hpu_stub.journal import note


def _create(store, rank, size, timeout):
    return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)


if "hccl" not in dist.Backend.backend_list:
    dist.Backend.register_backend("hccl", _create, devices=["cpu"])


def initialize_distributed_hpu(world_size=None, rank=None, local_rank=None):
    note("initialize_distributed_hpu")
    return tuple(int(os.environ[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
