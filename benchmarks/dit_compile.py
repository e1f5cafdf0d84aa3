"""A training step of DiT-S/2 (fp32, batch 8, latents 4 x 32 x 32), in turn: eager, compiled, checkpointed, the peer's.

The peer is facebookresearch/DiT's own models.py, eager as it is shipped, from a checkout that you name; it needs
`timm`, which is not a dependency of this project:

    git clone https://github.com/facebookresearch/DiT && pip install timm
    python -m benchmarks.dit_compile --peer DiT
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.dit_step import BATCH, CLASSES, peer_model, step_of
from benchmarks.record import save
from rqvae import backends
from rqvae.img_datasets.interfaces import ClassCondition, DataSpec
from rqvae.models.blocks import listed_blocks, recompute_activations
from rqvae.models.stage2.dit import DiT


def model() -> DiT:
    """DiT-S/2, with the same weights every time."""
    torch.manual_seed(0)
    return DiT((4, 32, 32), DataSpec((3, 256, 256), num_classes=CLASSES), size="S", patch=2).train()


def ours(network: DiT) -> Callable[[], None]:
    """A step of ours."""
    return step_of(network, lambda x, t, y: network(x, t, ClassCondition(y, CLASSES)))


def saved_bytes(network: DiT) -> int:
    """What a forward keeps for backward, besides the weights; storages count once."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # so that no other storage gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        network(torch.zeros(BATCH, 4, 32, 32), torch.zeros(BATCH), ClassCondition(torch.zeros(BATCH).long(), CLASSES))
    return sum(kept.values())


def rounds(steps: dict[str, Callable[[], None]], count: int) -> dict[str, np.ndarray]:
    """Seconds of each step in each round; the order turns from round to round, so that none always comes first."""
    names, seconds = list(steps), {name: np.empty(count) for name in steps}
    for i in range(count):
        for name in (*names[i % len(names) :], *names[: i % len(names)]):
            started = time.perf_counter()
            steps[name]()
            seconds[name][i] = time.perf_counter() - started
    return seconds


def ratio(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Median over rounds of a / b with its 95% bootstrap interval."""
    draws = np.random.default_rng(0).integers(0, len(a), (2000, len(a)))
    low, high = np.percentile(np.median((a / b)[draws], axis=1), [2.5, 97.5])
    return {"ratio": round(float(np.median(a / b)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, required=True, help="checkout of facebookresearch/DiT")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backend = backends.create("cpu")
    eager, compiled, checkpointed, peer = model(), model(), model(), peer_model(options.peer)
    recompute_activations(listed_blocks(checkpointed))
    for block in listed_blocks(compiled):
        backend.compile(block)
    steps = {"eager": ours(eager), "compiled": ours(compiled), "checkpointed": ours(checkpointed)}
    # label dropout is part of the peer's training forward, as dropping conditions is of ours outside the backbone
    steps["peer"] = step_of(peer, lambda x, t, y: peer(x, 1000 * t, y))
    for name, step in steps.items():
        started = time.perf_counter()
        step()
        if name == "compiled":
            first_step = time.perf_counter() - started
    graphs = counters["stats"]["unique_graphs"]
    rounds(steps, 1)
    seconds = rounds(steps, options.rounds)
    figures = {
        "rounds": options.rounds,
        "milliseconds": {name: round(float(np.median(s)) * 1e3, 1) for name, s in seconds.items()},
        "compiled / eager": ratio(seconds["compiled"], seconds["eager"]),
        "compiled / peer": ratio(seconds["compiled"], seconds["peer"]),
        "eager / peer": ratio(seconds["eager"], seconds["peer"]),
        "checkpointed / eager": ratio(seconds["checkpointed"], seconds["eager"]),
        "graph_breaks": sum(counters["graph_break"].values()),
        "graphs": graphs,
        "graphs_compiled_after_the_first_step": counters["stats"]["unique_graphs"] - graphs,
        "first_compiled_step_s": round(first_step, 1),
        "mib_kept_for_backward": {
            name: round(saved_bytes(network) / 2**20, 1)
            for name, network in (("eager", eager), ("compiled", compiled), ("checkpointed", checkpointed))
        },
    }
    save("dit_compile", figures)


if __name__ == "__main__":
    main()
