"""What devices can do at most, by the name that their driver gives them.

Dense TFLOP/s, that is without the factor of 2 that data sheets add for structured sparsity. `fp32` is TF32 where the
device has it: convolutions use it unless told otherwise, so that no smaller number bounds what an fp32 run reaches.
`fp64` is that of the tensor cores where they do fp64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_GAUDI = "Intel Gaudi 3 AI Accelerator White Paper, 2024, table of both generations (matrix engines)"
_HOPPER = "NVIDIA H100 / H200 Tensor Core GPU Datasheet, 2023 / 2024, half of the numbers with sparsity"
_TPU = "Google Cloud documentation, TPU versions, peak compute per chip (bf16)"

PEAKS: tuple[tuple[str, Mapping[str, float], str], ...] = (
    # A slice of a GPU, and chips that share a name with a larger one, have other peaks, which are not known here.
    (r"\bMIG\b|Laptop|4090 D\b", {}, ""),
    (r"\bH(100|200) NVL\b", {"bf16": 835.5, "fp16": 835.5, "fp32": 417.5, "fp64": 60.0}, _HOPPER),
    (r"\bH100 PCIe\b", {"bf16": 756.5, "fp16": 756.5, "fp32": 378.0, "fp64": 51.0}, _HOPPER),
    (r"\bH(100|200)\b", {"bf16": 989.5, "fp16": 989.5, "fp32": 494.5, "fp64": 67.0}, _HOPPER),
    (
        r"\bA100\b",
        {"bf16": 312.0, "fp16": 312.0, "fp32": 156.0, "fp64": 19.5},
        "NVIDIA A100 Tensor Core GPU Datasheet, 2021",
    ),
    (r"\bL40S\b", {"bf16": 362.05, "fp16": 362.05, "fp32": 183.0}, "NVIDIA L40S Datasheet, 2023"),
    (
        r"\bRTX 4090\b",
        {"bf16": 165.2, "fp16": 165.2, "fp32": 82.6},
        "NVIDIA Ada GPU Architecture, 2022, appendix A (16 bits with fp32 accumulation)",
    ),
    # no bf16 in Volta's tensor cores
    (r"\bV100-PCIE\b", {"fp16": 112.0, "fp32": 14.0, "fp64": 7.0}, "NVIDIA V100 Datasheet, 2018"),
    (r"\bV100-(SXM2|DGXS)\b", {"fp16": 125.0, "fp32": 15.7, "fp64": 7.8}, "NVIDIA V100 Datasheet, 2018"),
    (r"\bTPU v4\b", {"bf16": 275.0}, _TPU),
    (r"\bTPU (v5e|v5 lite)\b", {"bf16": 197.0}, _TPU),
    (r"\bTPU v5p?\b", {"bf16": 459.0}, _TPU),
    (r"\bTPU (v6e|v6 lite)\b", {"bf16": 918.0}, _TPU),
    (r"\bGAUDI ?2\b", {"bf16": 432.0}, _GAUDI),
    (r"\bGAUDI ?3\b", {"bf16": 1835.0}, _GAUDI),
)
"""Pattern in the device's name, dense TFLOP/s by precision, source. The first pattern that is found counts."""


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Dense peak of a device in TFLOP/s; None where it is not known.

    Args:
        device_name: as the driver gives it, for example `NVIDIA H100 80GB HBM3`.
        precision: bf16, fp16, fp32 or fp64.
    """
    for pattern, peaks, _ in PEAKS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return peaks.get(precision)
    return None
