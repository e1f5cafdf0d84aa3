"""What has to be decided before torch_xla is imported: it reads the environment once. Imports nothing of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rqvae.errors import BadInput

JOB = "RQVAE_XLA_JOB"
"""Set in the processes that our launcher started."""
SPMD = "RQVAE_XLA_SPMD"
"""1: one process drives all devices of the host, and the compiler splits the batch. Else one replica a device."""
MATMUL = "RQVAE_XLA_MATMUL"
"""How a TPU multiplies fp32 numbers: highest (6 passes in bf16, the default here), high (3) or default (1)."""
OPTIONS = ("spmd", "matmul_high", "matmul_default")
"""What may follow the backend's name."""
CACHE = "RQVAE_XLA_CACHE"
"""Folder of compiled programs that outlive the process."""

_PCI = Path("/sys/bus/pci/devices")
_GOOGLE = "0x1ae0"
_TPUS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
"""PCI vendor, and the devices v2 to v7, as torch_xla/_internal/tpu.py of 2.9 has them."""


def tpu_present() -> bool:
    """Whether this host has a TPU, or PJRT_DEVICE says so; looks at PCI, not at torch_xla."""
    if "PJRT_DEVICE" in os.environ:
        return os.environ["PJRT_DEVICE"].startswith("TPU")
    for vendor in _PCI.glob("*/vendor"):
        if vendor.read_text().strip() == _GOOGLE and (vendor.parent / "device").read_text().strip() in _TPUS:
            return True
    return False


def take(options: Sequence[str]) -> None:
    """Options of `--backend xla:OPTIONS`, which go the way of the environment, as torch_xla's own do."""
    if "spmd" in options:
        os.environ[SPMD] = "1"
    for option in options:
        if option.startswith("matmul_"):
            os.environ[MATMUL] = option.removeprefix("matmul_")


def matmul() -> Literal["highest", "high", "default"]:
    """The precision of fp32 products.

    Raises:
        BadInput: RQVAE_XLA_MATMUL is none of the three.
    """
    value = os.environ.get(MATMUL, "highest")
    if value not in ("highest", "high", "default"):
        raise BadInput(f"{MATMUL}: expected highest, high or default, got {value}")
    return value  # type: ignore[return-value]


def spmd() -> bool:
    """Whether one process is to drive all devices."""
    return os.environ.get(SPMD, "0") not in ("", "0")


def on_host() -> bool:
    """Whether XLA computes on the host's cores. Call `prepare` before."""
    return os.environ["PJRT_DEVICE"] == "CPU"


def prepare() -> None:
    """Check that torch_xla is there and has something to compute on: a TPU, or what PJRT_DEVICE names.

    Raises:
        BadInput: torch_xla is not installed, or there is no TPU: only who asks for the host's cores gets them.
    """
    if find_spec("torch_xla") is None:
        raise BadInput(
            "backend xla: expected torch_xla (pip install 'mae-dit[tpu]', torch of the same version), found none"
        )
    if "PJRT_DEVICE" not in os.environ:
        if not tpu_present():
            raise BadInput(
                "backend xla: expected a TPU on this host, found none; "
                "set PJRT_DEVICE=CPU to run XLA on this host's cores"
            )
        os.environ["PJRT_DEVICE"] = "TPU"


def set_devices(world_size: int) -> None:
    """Have this many devices on a host without TPU: for tests, where replicas are threads of one process.

    Without aliasing: a thread would otherwise wait, within the lock that the other one needs, for buffers to be free.
    """
    if on_host():
        os.environ["CPU_NUM_DEVICES"] = str(world_size)
        if not spmd():
            os.environ["XLA_ENABLE_PARAM_ALIASING"] = "0"
