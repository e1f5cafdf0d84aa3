"""What happened, in order: one word, or a word and details, an event."""

from __future__ import annotations

EVENTS: list[str] = []


def note(event: str) -> None:
    EVENTS.append(event)
