"""torch's own generator belongs to the process; ranks may be threads of one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rqvae.randomness import fold, kept, seeded
from tests.test_architecture import PACKAGE, modules


def test_start_weights_are_the_same_beside_a_rank_that_keeps_the_generator() -> None:
    """A rank that counts operations restores it; one that drew weights meanwhile used to draw some of them twice."""
    begun, entered, drawn, left = (threading.Event() for _ in range(4))

    def draw() -> torch.Tensor:
        with seeded(3, "weights"):
            begun.set()
            entered.wait(0.3)
            first = torch.rand(8)
            drawn.set()
            left.wait(0.3)
            return torch.cat((first, torch.rand(8)))

    def keep() -> None:
        begun.wait(5)
        with kept():
            entered.set()
            drawn.wait(5)
        left.set()

    with ThreadPoolExecutor(2) as ranks:
        weights, keeping = ranks.submit(draw), ranks.submit(keep)
        keeping.result(10)
        assert torch.equal(
            weights.result(10), torch.rand(16, generator=torch.Generator().manual_seed(fold(3, "weights")))
        )


def test_kept_leaves_no_trace() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    with kept():
        torch.rand(3)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_generator_is_kept_in_one_place(path) -> None:
    assert path.name == "randomness.py" or "fork_rng" not in path.read_text(), f"{path}: expected randomness.kept"
