"""What a run would be: shapes, parameters, operations and memory, from `meta` tensors, without data or weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rqvae.img_datasets.interfaces import ActionCondition, ClassCondition, Condition, DataSpec, LabeledImageData
from rqvae.models.interfaces import MaskCondition, Stage1Encodings
from rqvae.randomness import Draw
from rqvae.run import AnyRun, Stage1Run, Stage2Run
from rqvae.trainers.parts import float_type
from rqvae.trainers.stage2_trainer import make_two_stage


def dry_run(run: AnyRun) -> dict[str, Any]:
    """Describe a run whose objects are on `meta`.

    Returns:
        `shapes` of one image at every hop; `parameters` by part (total, trainable); `gflops_forward` of each trained
        part for one image (2 for each multiply-add); `memory_gib` of one process: weights, gradients, AdamW and
        averages, and the tensors that one image's forward keeps for backward.
    """
    with torch.device("meta"):
        return _stage1(run) if isinstance(run, Stage1Run) else _stage2(run)


def _stage1(run: Stage1Run) -> dict[str, Any]:
    spec = run.data.make("train")[0].spec
    stage1 = run.stage1.to(float_type(run.train.precision)).train()
    batch = one_image(spec, stage1.draws(spec.image_shape), run)
    latent = stage1.encode(batch).zs
    trained: dict[str, tuple[nn.Module, Callable[[], Any]]] = {"stage1": (stage1, lambda: stage1(batch))}
    shapes = {"image": batch.require_img(), "latent": latent, "reconstruction": stage1(batch).xs_recon}
    if run.gan:
        discriminator = run.gan.discriminator.to(float_type(run.train.precision))
        shapes["logits"] = discriminator(batch.require_img())
        trained["discriminator"] = (discriminator, lambda: discriminator(batch.require_img()))
    return _describe(run, shapes, {name: module for name, (module, _) in trained.items()}, trained)


def _stage2(run: Stage2Run) -> dict[str, Any]:
    two_stage = make_two_stage(run).to(float_type(run.train.precision)).train()
    spec, stage2 = run.data.make("train")[0].spec, two_stage.stage2
    draws = {**run.stage1.draws(spec.image_shape), **stage2.draws(two_stage.latent_shape)}
    batch = one_image(spec, draws, run, two_stage.latent_shape)
    latent = two_stage.stage1.encode(batch).zs
    # not through connector.forward: its statistics are not known before the data are seen
    encodings = Stage1Encodings(torch.empty(1, *two_stage.latent_shape, dtype=latent.dtype))
    output = stage2(encodings, batch)
    decoded = two_stage.stage1.decode(Stage1Encodings(latent)).xs_recon
    shapes = {"image": batch.require_img(), "latent": latent, "after connector": encodings.zs}
    shapes |= {"prediction": output.zs_pred, "decoded": decoded}
    parts = {"stage1": two_stage.stage1, "connector": two_stage.connector, "stage2": stage2}
    return _describe(run, shapes, parts, {"stage2": (stage2, lambda: stage2(encodings, batch))})


def one_image(
    spec: DataSpec, draws: Mapping[str, Draw], run: AnyRun, context_shape: tuple[int, ...] = ()
) -> LabeledImageData:
    """One image and all that comes with it, on `meta`.

    Args:
        spec: of the data.
        draws: the numbers the modules ask for.
        run: for its precision.
        context_shape: of each frame of history, where the data have them: the latent's.
    """
    dtype = float_type(run.train.precision)
    numbers = {name: torch.empty(1, *draw.shape, dtype=dtype) for name, draw in draws.items()}
    image = torch.empty(1, *spec.image_shape, dtype=dtype)
    return LabeledImageData(image, _condition(spec, context_shape, dtype), draws=numbers)


def _condition(spec: DataSpec, context_shape: tuple[int, ...], dtype: torch.dtype) -> Condition | None:
    if spec.num_classes:
        return ClassCondition(torch.zeros(1, dtype=torch.long), spec.num_classes)
    if spec.num_actions:
        slots = torch.zeros(1, max(1, spec.history), dtype=torch.long)
        context = torch.empty(1, spec.history, *context_shape, dtype=dtype) if spec.context else None
        return ActionCondition(context, slots, slots == 0, spec.num_actions)
    if spec.num_mask_classes:
        return MaskCondition(torch.zeros(1, *spec.image_shape[1:], dtype=torch.long), spec.num_mask_classes)
    return None


def _describe(
    run: AnyRun,
    shapes: Mapping[str, Tensor],
    parts: Mapping[str, nn.Module],
    trained: Mapping[str, tuple[nn.Module, Callable[[], Any]]],
) -> dict[str, Any]:
    parameters = {
        name: {
            "total": sum(p.numel() for p in module.parameters()),
            "trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
        }
        for name, module in parts.items()
    }
    flops, kept = {}, 0
    for name, (module, forward) in trained.items():
        flops[name], saved = forward_cost(module, forward)
        kept += saved
    size = float_type(run.train.precision).itemsize
    learnt = sum(parameters[name]["trainable"] for name in trained)
    main = parameters[next(iter(trained))]["trainable"]
    averages = (len(run.ema.decays) + len(run.ema.power)) * main
    state = size * (sum(p["total"] for p in parameters.values()) + 3 * learnt + averages)
    return {
        "shapes": {name: list(x.shape[1:]) for name, x in shapes.items()},
        "parameters": parameters,
        "gflops_forward": {name: round(value / 1e9, 3) for name, value in flops.items()},
        "memory_gib": {"weights, gradients, AdamW, averages": state / 2**30, "activations of one image": kept / 2**30},
    }


def forward_cost(module: nn.Module, forward: Callable[[], Any]) -> tuple[int, int]:
    """Floating-point operations of a forward, and the bytes that it keeps for backward besides the weights."""
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()  # views of one storage count once
            alive.append(storage)  # so that no other storage gets its address
        return x

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        forward()
    return counter.get_total_flops(), sum(kept.values())
