"""A world model as ONNX: one evaluation of the network, and the decoder; with them any runtime can dream.

A solver is not part of the graph. Euler and `renoise` are affine in what the network answers, so a step of either is
three numbers, which `solver_table` writes down for times that are fixed: x <- a x + b prediction + c noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rqvae.diffusion.sampling import Sampler
from rqvae.errors import BadInput, RunFailed
from rqvae.models.interfaces import ActionCondition, DataSpec, Stage1Encodings
from rqvae.models.stage2.diffusion import LatentDiffusion
from rqvae.models.two_stage import TwoStage
from rqvae.randomness import generator, normal

FILES = ("step.onnx", "decode.onnx")
TOLERANCE = 1e-4
STEP_INPUTS = ("context", "actions", "mask", "x", "t")
INSTALL = "pip install 'mae-dit[onnx]'"


class Step(nn.Module):
    """One evaluation of the network.

    Args:
        stage2: a diffusion model on frames and actions.
        num_actions: of the game.
    """

    def __init__(self, stage2: LatentDiffusion, num_actions: int) -> None:
        super().__init__()
        self.backbone, self.num_actions = stage2.backbone, num_actions

    def forward(
        self, context_bkchw: Tensor, actions_bk: Tensor, mask_bk: Tensor, x_bchw: Tensor, t_b: Tensor
    ) -> Tensor:
        """The prediction (B, C, h, w) from latents of the context, actions (int64), mask (bool), noisy latent, time."""
        condition = ActionCondition(context_bkchw, actions_bk, mask_bk, self.num_actions, encoded=True)
        return self.backbone(x_bchw, t_b, condition)


class Decoder(nn.Module):
    """Frames (B, 3, H, W) in [0, 1] of Stage2's latents (B, C, h, w)."""

    def __init__(self, two_stage: TwoStage) -> None:
        super().__init__()
        self.two_stage = two_stage

    def forward(self, zs_bchw: Tensor) -> Tensor:
        """See the class."""
        return self.two_stage.decode(Stage1Encodings(zs_bchw)).clamp(0, 1)


def export_onnx(two_stage: TwoStage, spec: DataSpec, folder: Path) -> None:
    """Write `step.onnx` and `decode.onnx`, for batches of one, with their weights inside.

    `step.onnx` takes `context` (1, K, C, h, w), `actions` (1, K) int64, `mask` (1, K) bool, `x` (1, C, h, w), `t` (1,)
    and gives `prediction`; `decode.onnx` takes `zs` and gives `frame` (1, 3, H, W).

    Args:
        two_stage: a world model in eval mode, on the host.
        spec: of its data.
        folder: exists.

    Raises:
        BadInput: a model without a network that can be called so, or with an operation that ONNX has not; no exporter.
    """
    if not isinstance(two_stage.stage2, LatentDiffusion):
        raise BadInput(f"onnx: expected a LatentDiffusion such as WorldModel, got {type(two_stage.stage2).__name__}")
    shape, slots = two_stage.latent_shape, spec.history
    actions, mask = torch.zeros(1, slots, dtype=torch.int64), torch.ones(1, slots, dtype=torch.bool)
    inputs = (torch.zeros(1, slots, *shape), actions, mask, torch.zeros(1, *shape), torch.full((1,), 0.5))
    step = Step(two_stage.stage2, spec.num_actions).eval()
    _export(step, inputs, folder / FILES[0], STEP_INPUTS, "prediction")
    _export(Decoder(two_stage).eval(), (torch.zeros(1, *shape),), folder / FILES[1], ("zs",), "frame")


def open_session(file: Path, threads: int = 1) -> Any:
    """onnxruntime on the CPU with a file that was written here.

    Raises:
        BadInput: onnxruntime is not installed.
    """
    try:
        from onnxruntime import InferenceSession, SessionOptions
    except ImportError as error:
        raise BadInput(f"onnx: expected the packages of the extra [onnx], got {error}; {INSTALL}") from error
    options = SessionOptions()
    options.intra_op_num_threads = threads
    return InferenceSession(file, options, providers=["CPUExecutionProvider"])


def check_onnx(two_stage: TwoStage, spec: DataSpec, folder: Path) -> float:
    """Run both files by onnxruntime on the CPU beside torch, on random latents and frames.

    Returns:
        The largest difference of any number, over three times and of the frame.

    Raises:
        BadInput: onnxruntime is not installed.
        RunFailed: a difference above 1e-4: the files are not the model.
    """
    assert isinstance(two_stage.stage2, LatentDiffusion), "as export_onnx has found"
    shape, numbers = two_stage.latent_shape, generator("onnx")
    step = Step(two_stage.stage2, spec.num_actions).eval()
    sessions = [open_session(folder / name) for name in FILES]
    differences = []
    for t in (1.0, 0.5, 0.02):
        context = normal((1, spec.history, *shape), generator=numbers)
        actions = torch.randint(spec.num_actions + 1, (1, spec.history), generator=numbers)
        mask, x = torch.ones_like(actions, dtype=torch.bool), normal((1, *shape), generator=numbers)
        mask[:, 0] = t < 1
        inputs = (context, actions, mask, x, torch.full((1,), t))
        with torch.no_grad():
            pairs = ((step, inputs, STEP_INPUTS), (Decoder(two_stage), (x,), ("zs",)))
            for session, (module, given, names) in zip(sessions, pairs, strict=True):
                feeds = {name: value.numpy() for name, value in zip(names, given, strict=True)}
                found = torch.from_numpy(session.run(None, feeds)[0])
                differences.append((found - module(*given)).abs().max())
    worst = float(torch.stack(differences).max())  # NaN where one is
    if not worst <= TOLERANCE:
        raise RunFailed(f"{folder}: expected the numbers of torch within {TOLERANCE:g}, they differ by {worst:g}")
    return worst


def _export(module: nn.Module, inputs: tuple[Tensor, ...], path: Path, names: Sequence[str], output: str) -> None:
    """Through `torch.export`: the older exporter has no RMS norm."""
    try:
        import onnxscript  # noqa: F401  (what the exporter writes with)
    except ImportError as error:
        raise BadInput(f"onnx: expected the packages of the extra [onnx], got {error}; {INSTALL}") from error
    options: dict[str, Any] = {"dynamo": True, "external_data": False, "verbose": False}
    try:
        with torch.no_grad():
            torch.onnx.export(module, inputs, path, input_names=list(names), output_names=[output], **options)
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).strip().partition("\n")[0]
        raise BadInput(f"onnx: {path.name}: expected operations that torch.onnx can write, got: {reason}") from error


def solver_table(stage2: LatentDiffusion, solver: str, sampler: Sampler, steps: int) -> list[list[float]]:
    """Rows (t, a, b, c) of a solver's steps: x <- a x + b prediction + c noise, the prediction made at (x, t).

    Args:
        stage2: whose path and prediction these are.
        solver: euler or renoise.
        sampler: whose shift and start are kept.
        steps: how many.

    Raises:
        BadInput: another solver, or guidance, which would need two evaluations.
    """
    if solver not in ("euler", "renoise"):
        raise BadInput(f"solver: expected euler or renoise, whose steps are three numbers, got {solver}")
    if sampler.guidance is not None:
        raise BadInput(f"sampler.guidance: expected none for a model that runs elsewhere, got {sampler.guidance}")
    times, path = replace(sampler, steps=steps).times(), stage2.path
    wanted = "velocity" if solver == "euler" else "x0"
    rows = []
    for t, after in zip(times[:-1], times[1:], strict=True):
        of_x, of_prediction = _conversion(stage2, t, wanted)
        if solver == "euler":
            dt = float(after - t)
            rows.append([float(t), 1 + dt * of_x, dt * of_prediction, 0.0])
        else:
            alpha, sigma = float(path.alpha(after)), float(path.sigma(after))
            rows.append([float(t), alpha * of_x, alpha * of_prediction, sigma])
    return rows


def _conversion(stage2: LatentDiffusion, t: Tensor, wanted: Any) -> tuple[float, float]:
    """Weights of x and of the prediction, whose sum is what is wanted."""
    if stage2.prediction == wanted:
        return 0.0, 1.0
    of_x, of_prediction = stage2.path.conversion(t, stage2.prediction, wanted)
    return float(of_x), float(of_prediction)
