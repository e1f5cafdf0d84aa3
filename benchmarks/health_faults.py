"""Twelve faults put into a small conditional diffusion that is really trained, and 20 clean seeds: what the log shows.

`python -m benchmarks.health_faults [--keep FOLDER]`: each run writes a metrics.jsonl with what a live observer would
log (losses by timestep, gradient norm, update ratio, change of each group of weights, statistics of the latents,
held-out losses of weights and average, loss under shuffled conditions), and the checks see that file alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path

import torch
from torch import nn

from benchmarks.record import save
from rqvae.health.examine import examine
from rqvae.health.readers import read_log

STEPS, BATCH, DIM, CLASSES, EVERY, PROBE, LR = 600, 128, 8, 4, 2, 50, 2e-3
WANTED: dict[str, set[str]] = {
    "lr x100": {"LOSS.DIVERGED", "LOSS.NOT_DECREASING", "DIFF.TRIVIAL_PREDICTOR", "NUM.NONFINITE", "DIFF.INIT_LEVEL"},
    "lr zero": {"OPT.LR_TOO_LOW", "PARAM.UNCHANGED"},
    "gradients never cleared": {"GRAD.EXPLODING", "GRAD.RISING", "LOSS.DIVERGED", "LOSS.NOT_DECREASING"},
    "conditions shuffled": {"COND.MASK_IGNORED"},
    "wrong scale of latents": {"LATENT.SCALE"},
    "2x - 1 on latents": {"LATENT.SHIFT"},
    "frozen block": {"PARAM.UNCHANGED"},
    "target in the input": {"GEN.TOO_EASY"},
    "NaN batch": {"NUM.NONFINITE"},
    "average never updated": {"EMA.LAG"},
    "accumulation not divided": {"SCALE.ACCUM_NOT_DIVIDED"},
    "t always 0": {"DIFF.T_COVERAGE"},
}


class Denoiser(nn.Module):
    """eps of x_t (B, DIM), the level t (B,) in [0, 1) and a condition (B, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2 * DIM + 2 + CLASSES, 64)
        self.middle = nn.Linear(64, 64)
        self.head = nn.Linear(64, DIM)

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor, leak: torch.Tensor) -> torch.Tensor:
        features = torch.cat([x, torch.sin(3 * t)[:, None], t[:, None], condition, leak], dim=1)
        hidden = torch.nn.functional.silu(self.stem(features))
        return self.head(hidden + torch.nn.functional.silu(self.middle(hidden)))


def data(count: int, generator: torch.Generator, means: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (B, DIM) of unit variance about one mean a class, and one-hot conditions (B, CLASSES)."""
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    x = 0.8 * means[labels] + 0.6 * torch.randn(count, DIM, generator=generator)
    return x, nn.functional.one_hot(labels, CLASSES).float()


def losses(
    net: Denoiser, x: torch.Tensor, condition: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, leak: bool
) -> torch.Tensor:
    """Squared errors (B,) of predicted noise on the cosine path."""
    angle = (0.5 * torch.pi * t)[:, None]
    mixed = torch.cos(angle) * x + torch.sin(angle) * noise
    shown = noise if leak else torch.zeros_like(noise)
    return (net(mixed, t, condition, shown) - noise).square().mean(dim=1)


def train(folder: Path, fault: str, seed: int) -> Path:
    """One run with a fault ("" for none); its metrics.jsonl."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    means = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(7))
    net = Denoiser()
    average = copy.deepcopy(net)
    if fault == "frozen block":
        net.middle.requires_grad_(False)
    rate = {"lr x100": 100 * LR, "lr zero": 0.0}.get(fault, LR)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=rate)
    rows, start = [], {n: p.detach().clone() for n, p in net.named_parameters()}
    for step in range(1, STEPS + 1):
        x, condition = data(BATCH, generator, means)
        x = {"wrong scale of latents": 5.5 * x, "2x - 1 on latents": 2 * x - 1}.get(fault, x)
        if fault == "conditions shuffled":
            condition = condition[torch.randperm(BATCH, generator=generator)]
        if fault == "NaN batch" and step == 400:
            x = x * float("nan")
        t = torch.rand(BATCH, generator=generator) * (0.02 if fault == "t always 0" else 1.0)
        each = losses(
            net, x, condition, t, torch.randn(BATCH, DIM, generator=generator), fault == "target in the input"
        )
        loss = each.mean() * (8 if fault == "accumulation not divided" else 1)
        if fault != "gradients never cleared":
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]))
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        optimizer.step()
        if fault != "average never updated":
            for mean, now in zip(average.parameters(), net.parameters(), strict=True):
                mean.data.lerp_(now.data, 0.03)
        if step % EVERY == 0:
            rows.append(row(net, step, loss, each, t, x, norm, before, start, rate))
            start = {n: p.detach().clone() for n, p in net.named_parameters()}
        if step % PROBE == 0:
            rows[-1] |= probes(net, average, means, fault)
    folder.mkdir(parents=True, exist_ok=True)
    config = f"objective: pred_noise\ntimesteps: 1000\nlr: {rate}\nsteps: {STEPS}\nbatch_size: {BATCH}\n"
    (folder / "config.yaml").write_text(config + ("accumulation: 8\n" if "accumulation" in fault else ""))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(finite(r)) + "\n" for r in rows))
    return folder / "metrics.jsonl"


def finite(entry: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {k: v if v - v == 0 else None for k, v in entry.items()}


def row(
    net: Denoiser, step: int, loss: torch.Tensor, each: torch.Tensor, t: torch.Tensor, x: torch.Tensor,
    norm: torch.Tensor, before: dict[str, torch.Tensor], start: dict[str, torch.Tensor], rate: float,
) -> dict[str, float]:  # fmt: skip
    """What is logged every second step."""
    entry = {"step": step, "images": step * BATCH, "epoch": 0.0, "time": float(step)}
    entry |= {"train/loss": float(loss.detach()), "train/grad_norm": float(norm), "train/lr": rate}
    for quarter in range(4):
        inside = (t >= quarter / 4) & (t < (quarter + 1) / 4)
        if inside.any():
            entry[f"train/loss_q{quarter}"] = float(each.detach()[inside].mean())
    moved = sum(float((p.detach() - before[n]).norm()) ** 2 for n, p in net.named_parameters()) ** 0.5
    whole = sum(float(p.detach().norm()) ** 2 for p in net.parameters()) ** 0.5
    entry["train/update_ratio"] = moved / whole
    for group in ("stem", "middle", "head"):
        entry[f"train/param_change_{group}"] = float(
            (getattr(net, group).weight.detach() - start[f"{group}.weight"]).norm()
        )
    entry |= {
        "train/latent_std": float(x.std()),
        "train/latent_mean": float(x.mean()),
        "draw/timestep": float(1000 * t[0]),
    }
    return entry


@torch.no_grad()
def probes(net: Denoiser, average: Denoiser, means: torch.Tensor, fault: str) -> dict[str, float]:
    """Held-out losses on fixed data, noise and levels."""
    fixed = torch.Generator().manual_seed(99)
    x, condition = data(2048, fixed, means)
    t = torch.rand(2048, generator=fixed) * (0.02 if fault == "t always 0" else 1.0)
    noise, leak = torch.randn(2048, DIM, generator=fixed), fault == "target in the input"
    shuffled = condition[torch.randperm(2048, generator=fixed)]
    right = float(losses(net, x, condition, t, noise, leak).mean())
    wrong = float(losses(net, x, shuffled, t, noise, leak).mean())
    ema = float(losses(average, x, condition, t, noise, leak).mean())
    return {"val/loss": right, "val/ema_loss": ema, "val/loss_mask_right": right, "val/loss_mask_shuffled": wrong}


def found(path: Path) -> dict[str, set[str]]:
    """Ids by severity."""
    from rqvae.health.settings import read_settings

    told: dict[str, set[str]] = {}
    for finding in examine(read_log(path), read_settings(path.parent / "config.yaml")).findings:
        told.setdefault(finding.severity, set()).add(finding.check.id)
    return told


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--keep", type=Path)
    options.add_argument("--seeds", type=int, default=20)
    given = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        hits, clean = {}, []
        for fault, wanted in WANTED.items():
            told = found(train(folder / fault.replace(" ", "_"), fault, seed=1))
            every = set().union(*(ids for severity, ids in told.items() if severity != "info"))
            hits[fault] = sorted(every & wanted) or [f"missed; told {sorted(every)}"]
        for seed in range(given.seeds):
            told = found(train(folder / f"clean_{seed}", "", seed))
            clean.append(sorted(told.get("critical", set()) | told.get("major", set())))
    caught = sum(not names[0].startswith("missed") for names in hits.values())
    false = {
        "clean_seeds": given.seeds,
        "with_critical_or_major": sum(map(bool, clean)),
        "which": sorted({i for c in clean for i in c}),
    }
    save("health_faults", {"faults": len(hits), "found": caught, **false, "by_fault": hits})


if __name__ == "__main__":
    main()
