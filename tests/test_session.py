"""When the ranks of a run agree to stop. The other ranks are played: only this one ever has something to say."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch import Tensor

from rqvae.backends import Backend
from rqvae.trainers.session import Session


def ranks(meanwhile: Callable[[], object]) -> Backend:
    """Two of them: `meanwhile` happens while this one, which has cast its vote, waits for the other one's."""

    def all_reduce(votes: Tensor, op: str) -> Tensor:
        assert op == "max"
        votes = votes.clone()
        meanwhile()
        return votes

    return cast(Backend, SimpleNamespace(world_size=2, device="cpu", all_reduce=all_reduce))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_while_the_ranks_vote_is_in_the_next_vote(number: int, tmp_path: Path) -> None:
    todo: list[Callable[[], Any]] = [lambda: os.kill(os.getpid(), number)]
    backend = ranks(lambda: todo.pop()() if todo else None)
    with Session(tmp_path, None, check_seconds=0) as session:
        answers = [session.stopping(backend) for _ in range(4)]
    assert answers == [False, False, False, True], "one step until the first vote, one between two votes"
    assert session.signal == number


def test_a_signal_counts_when_the_ranks_have_agreed_on_it(tmp_path: Path) -> None:
    with Session(tmp_path, None, check_seconds=0) as session:
        os.kill(os.getpid(), signal.SIGTERM)
        assert session.signal == 0, "the other rank does not know of it yet"
        assert [session.stopping(ranks(lambda: None)) for _ in range(2)] == [False, True]
        assert session.signal == signal.SIGTERM
