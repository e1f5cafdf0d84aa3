"""A network whose answers onnxruntime gives: at batch 1 on a CPU the same numbers in less time than eager torch."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from rqvae.errors import BadInput
from rqvae.models.interfaces import ActionCondition, Condition, DataSpec
from rqvae.models.two_stage import TwoStage
from rqvae.play.onnx_export import FILES, STEP_INPUTS, check_onnx, export_onnx, open_session


class OnnxNetwork(nn.Module):
    """In place of the network of a `LatentDiffusion` that is played.

    Args:
        network: that the file was made from; keeps the weights, and is not called.
        file: `step.onnx` of `export_onnx`.
        threads: of onnxruntime.
    """

    def __init__(self, network: nn.Module, file: Path, threads: int) -> None:
        super().__init__()
        self.network = network
        self._session = open_session(file, threads)

    def forward(self, x_bchw: Tensor, t_b: Tensor, condition: Condition | None) -> Tensor:
        """One answer, for a batch of one on the host.

        Raises:
            BadInput: a larger batch, or a condition without frames.
        """
        if len(x_bchw) != 1 or not isinstance(condition, ActionCondition) or condition.context is None:
            raise BadInput(f"onnx: expected one frame with its context and actions, got a batch of {len(x_bchw)}")
        given = (condition.context, condition.actions, condition.mask, x_bchw, t_b)
        feeds = {name: value.numpy() for name, value in zip(STEP_INPUTS, given, strict=True)}
        return torch.from_numpy(self._session.run(None, feeds)[0])


def use_onnx(two_stage: TwoStage, spec: DataSpec, threads: int) -> None:
    """Let onnxruntime answer in place of the network, after it has answered as torch does.

    Args:
        two_stage: a world model in eval mode on the host; changed in place.
        spec: of its data.
        threads: of onnxruntime.

    Raises:
        BadInput: a model that ONNX cannot say, or the extra is not installed.
        RunFailed: other answers than torch's.
    """
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(two_stage, spec, Path(folder))
        check_onnx(two_stage, spec, Path(folder))
        stage2: nn.Module = two_stage.stage2
        stage2.backbone = OnnxNetwork(stage2.backbone, Path(folder) / FILES[0], threads)  # type: ignore[arg-type]
