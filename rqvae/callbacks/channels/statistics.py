"""What is summed of each channel, on the device, and what the sums mean.

Each statistic is a mean over positions within a sample, then over samples, micro-batches, steps and ranks, so that it
is a sum over samples until it is read. Second moments are summed about each sample's own mean: E[x^2] - E[x]^2 in fp32
gives 0 for a channel of mean 1000 and std 1e-3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rqvae.callbacks.channels.layers import Layer
from rqvae.callbacks.channels.wiring import Wire, inputs_first, outputs_first

ACTIVATION_SUMS = ("mean", "square", "abs", "peak", "near_zero", "sensitivity")
"""`peak` is the largest |h| of a sample; `sensitivity` the mean |derivative of the activation|, 1 without one."""
PARAMETERS = ("weight_norm", "grad_norm", "gamma", "beta", "in_norm", "out_norm")
"""NaN where a layer has none: gamma and beta are of norms, in and out need a neighbour that is known."""
LATENT_SUMS = ("mean", "square", "kl", "clamped")
DETAIL_POSITIONS = 256
"""Positions of a map at which `near_zero` and `sensitivity` are taken, about: at all of them they cost most."""
RUN = 16
PART_ELEMENTS = 2**20
"""Of a map that are taken at once on the host: 4 MiB in fp32."""
_STEP = 1e-2


def as_rows(h: Tensor, layer: Layer) -> Tensor:
    """A layer's output as (B, C, N) in at least fp32."""
    h = h.detach()
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    if layer.channels_last:
        return h.reshape(h.shape[0], -1, layer.channels).transpose(1, 2)
    return h.reshape(h.shape[0], layer.channels, -1)


def some_positions(rows: Tensor) -> Tensor:
    """About `DETAIL_POSITIONS` of a map's positions (the last axis), all of a small one.

    Runs of `RUN` neighbours, which lie in one line of a processor's cache, at an odd stride, which meets all columns.
    """
    positions = rows.shape[-1]
    if positions < 2 * DETAIL_POSITIONS:
        return rows
    runs = rows[..., : positions // RUN * RUN].unflatten(-1, (-1, RUN))
    return runs[..., :: (positions // DETAIL_POSITIONS) | 1, :].flatten(-2)


class Scratch:
    """Memory that is written again and again: on the host new pages for each layer cost more than what is computed."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, Tensor] = {}

    def like(self, x: Tensor) -> Tensor:
        """Memory of the shape and order of `x`, to be written over; shared with what was given before."""
        known = self._buffers.get(x.dtype)
        if known is None or known.numel() < x.numel():
            known = self._buffers[x.dtype] = torch.empty(x.numel(), dtype=x.dtype)
        return known.as_strided(x.shape, torch.empty_like(x, device="meta").stride())


@torch.no_grad()
def activation_sums(
    a_bcn: Tensor, wire: Wire, near_zero: float, dtype: torch.dtype, scratch: Scratch | None = None
) -> Tensor:
    """(6, C): `ACTIVATION_SUMS`, summed over the batch, of a layer's output after the activation that follows it.

    Args:
        a_bcn: the layer's own output, see `as_rows`.
        wire: what follows it.
        near_zero: |h| that counts as near zero.
        dtype: of the sums; float64 where the device has it.
        scratch: used on the host, where few samples are taken at once, so that they stay in the processor's cache.
    """
    on_host = a_bcn.device.type == "cpu"
    samples = max(1, PART_ELEMENTS // max(a_bcn[0].numel(), 1)) if on_host else len(a_bcn)
    buffers = scratch if on_host else None
    parts = [_statistics(part, wire, near_zero, dtype, buffers).sum(1) for part in a_bcn.split(samples)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _statistics(a_bcn: Tensor, wire: Wire, near_zero: float, dtype: torch.dtype, scratch: Scratch | None) -> Tensor:
    """(6, B, C): `ACTIVATION_SUMS` of each channel of each sample."""
    h_bcn = a_bcn if wire.activation is None else wire.activation(a_bcn)
    mean_bc = h_bcn.mean(2)
    size_bcn = h_bcn.abs() if scratch is None else torch.abs(h_bcn, out=scratch.like(h_bcn))
    near_bc = (some_positions(size_bcn) <= near_zero).to(h_bcn.dtype).mean(2)
    rest = [size_bcn.mean(2), size_bcn.amax(2), near_bc]
    centred_bcn = torch.sub(h_bcn, mean_bc[..., None], out=size_bcn)
    spread_bc = centred_bcn.square_().mean(2)  # vector_norm takes 10 times as long on channels_last
    if wire.activation is None:
        rest.append(torch.ones_like(mean_bc))
    else:
        rest.append(derivative(wire, some_positions(a_bcn)).abs().mean(2))
    rows = torch.stack([mean_bc, spread_bc, *rest]).to(dtype)
    rows[1] += rows[0].square()
    return rows


def _silu_derivative(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 + a * (1 - s))


_DERIVATIVES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu_derivative,
    "relu": lambda a: (a > 0).to(a.dtype),
    "sigmoid": lambda a: torch.sigmoid(a) * (1 - torch.sigmoid(a)),
    "tanh": lambda a: 1 - torch.tanh(a).square(),
}


def derivative(wire: Wire, a: Tensor) -> Tensor:
    """The activation's derivative at `a`: the formula of the usual ones, a central difference of any other."""
    assert wire.activation is not None
    known = _DERIVATIVES.get(wire.activation_name)
    if known is not None:
        return known(a)
    return (wire.activation(a + _STEP) - wire.activation(a - _STEP)) / (2 * _STEP)


@torch.no_grad()
def pair_sums(h_bcn: Tensor, dtype: torch.dtype) -> Tensor:
    """(C + 1, C): means of all products of two channels at `some_positions`, and of each channel, summed over B."""
    some_bcn = some_positions(h_bcn)
    ones_b1n = torch.ones_like(some_bcn[:, :1])
    products_bcc = torch.cat([some_bcn, ones_b1n], 1) @ some_bcn.transpose(1, 2) / some_bcn.shape[2]
    return products_bcc.to(dtype).sum(0)


@torch.no_grad()
def latent_sums(moments: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sums over the batch of a posterior's moments (B, 2C, h, w), or (B, 2C).

    Returns:
        (4, C): `LATENT_SUMS`; the KL to N(0, 1) in nats a dimension (Kingma & Welling 2014, appendix B), the share of
        log-variances at the bounds [-30, 20]. (2, C N): mu and mu^2 at each place.
    """
    moments = moments.detach().to(torch.promote_types(moments.dtype, torch.float32))
    mu_bcn, raw_bcn = (part.flatten(2) if part.ndim > 2 else part[..., None] for part in moments.chunk(2, 1))
    mu_bcn, logvar_bcn = mu_bcn.to(dtype), raw_bcn.clamp(-30, 20)
    kl_bcn = 0.5 * (mu_bcn.square() + logvar_bcn.exp() - 1 - logvar_bcn)
    clamped_bcn = (raw_bcn <= -30) | (raw_bcn >= 20)
    parts = [mu_bcn, mu_bcn.square(), kl_bcn, clamped_bcn]
    per_channel = torch.stack([x.to(dtype).mean(2).sum(0) for x in parts])
    return per_channel, torch.stack([mu_bcn.flatten(1).sum(0), mu_bcn.square().flatten(1).sum(0)])


@torch.no_grad()
def parameter_table(layer: Layer, wire: Wire, whole: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """(6, C): `PARAMETERS` of a layer as they are now, gradients included.

    Args:
        layer: tracked.
        wire: its neighbours.
        whole: gives all of a tensor that is split over processes.
        dtype: of the table.
    """
    weight, bias = (getattr(layer.module, name, None) for name in ("weight", "bias"))
    if not isinstance(weight, Tensor):
        return torch.full((len(PARAMETERS), layer.channels), torch.nan, dtype=dtype)
    nothing = torch.full((layer.channels,), torch.nan, dtype=dtype, device=weight.device)
    rows: dict[str, Tensor] = dict.fromkeys(PARAMETERS, nothing)
    rows["weight_norm"] = _row_norms(outputs_first(layer.module, whole(weight.detach())))
    gradients = [whole(p.grad) for p in (weight, bias) if isinstance(p, Tensor) and p.grad is not None]
    if gradients:
        norms = [_row_norms(outputs_first(layer.module, grad)) for grad in gradients]
        rows["grad_norm"] = torch.stack(norms).square().sum(0).sqrt()
    if layer.is_norm:
        rows["gamma"] = whole(weight.detach())
        rows["beta"] = whole(bias.detach()) if isinstance(bias, Tensor) else nothing
    if wire.source is not None:
        rows["in_norm"] = _row_norms(outputs_first(wire.source, whole(wire.source.get_parameter("weight").detach())))
    if wire.target is not None:
        rows["out_norm"] = _row_norms(inputs_first(wire.target, whole(wire.target.get_parameter("weight").detach())))
    return torch.stack([rows[name].to(dtype) for name in PARAMETERS])


def _row_norms(weight: Tensor) -> Tensor:
    """The norm of each entry along the first axis."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return torch.linalg.vector_norm(weight.reshape(weight.shape[0], -1), dim=1)
