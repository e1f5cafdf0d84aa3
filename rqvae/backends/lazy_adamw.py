"""AdamW for devices that trace a step before they run it: nothing in it is known on the host but the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class LazyAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) whose step counter and learning rate are data of the graph.

    `torch.optim.AdamW` is either fused, which such a device refuses, or counts on the host: then 1 - beta2**step enters
    the graph as a number, and a number that becomes exactly 0 or 1 (a learning rate at the end of a schedule, this one
    after some 40000 steps) is compiled into it and the whole step compiled again. Its `capturable` form computes
    1 - beta2**step in fp32, which is wrong by 3e-5 in the first step.

    There is state from the start, so that the first step has the graph of all later ones. It is that of the fused
    AdamW: `step`, `exp_avg` and `exp_avg_sq` of each parameter, on the device.
    `found_inf` (1 where the step is to be left out) is taken as fused optimizers take it.

    Args:
        params: parameters of one device.
        lr: learning rate; `param_groups[...]["lr"]` may be set at any time.
        betas: decay of both moments.
        eps: added to the root of the second moment.
        weight_decay: of the weights, times the learning rate.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                self._begin(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change the weights once.

        Args:
            closure: not supported; the gradients are there.
        """
        assert closure is None
        skipped = getattr(self, "found_inf", None)
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if not trained:
                continue
            # with an axis: without one, 0 and 1 would be compiled into the step
            lr = torch.tensor([group["lr"]], dtype=torch.promote_types(trained[0].dtype, torch.float32))
            lr = lr.to(trained[0].device).reshape(())
            for p in trained:
                self._change(p, group, lr, None if skipped is None else skipped > 0)

    def _change(self, p: nn.Parameter, group: dict[str, Any], lr: Tensor, skipped: Tensor | None) -> None:
        assert p.grad is not None
        state, (beta1, beta2) = self.state[p] or self._begin(p), group["betas"]
        step = state["step"] + 1
        exp_avg = state["exp_avg"] + (p.grad - state["exp_avg"]) * (1 - beta1)
        exp_avg_sq = state["exp_avg_sq"] * beta2 + p.grad.square() * (1 - beta2)
        # 1 - beta**step without the cancellation of small steps
        age = step.to(lr.dtype)
        correction1, correction2 = (-torch.expm1(age * math.log(beta)) if beta else 1.0 for beta in (beta1, beta2))
        denominator = (exp_avg_sq / correction2).sqrt() + group["eps"]
        weights = p * (1 - lr * group["weight_decay"]) - (lr / correction1) * exp_avg / denominator
        new = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        for name, value in new.items():
            state[name].copy_(value if skipped is None else torch.where(skipped, state[name], value))
        p.copy_(weights if skipped is None else torch.where(skipped, p, weights))

    def _begin(self, p: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[p]
        state["step"] = torch.zeros((), device=p.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return state
