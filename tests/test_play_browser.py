"""The page of `play` in a real browser: keys go in, frames change."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rqvae.games.maze import DOWN, LEFT, RIGHT, UP
from rqvae.games.sprites import player_sprite
from tests.browser import Page, chromium
from tests.conftest import ROOT
from tests.test_world_commands import run  # noqa: F401  (a fixture)

ARROWS = {"ArrowUp": UP, "ArrowRight": RIGHT, "ArrowLeft": LEFT, "ArrowDown": DOWN}


def picture(page: Page, canvas: str) -> np.ndarray:
    return np.array(page.pixels(canvas), dtype=np.uint8).reshape(32, 32, 4)[..., :3]


def facing(frame: np.ndarray) -> int | None:
    """Where the player looks in a frame of the real game."""
    tiles = frame.reshape(8, 4, 8, 4, 3).swapaxes(1, 2).reshape(64, 4, 4, 3)
    return next((d for d in ARROWS.values() if (tiles == player_sprite(d)).all((1, 2, 3)).any()), None)


def frame_number(page: Page) -> int:
    return int(page.run("Number((document.getElementById('numbers').textContent.match(/frame (\\d+)/) || [0, 0])[1])"))


ATARI = ["NOOP", "UP", "RIGHT", "LEFT", "DOWN", "UPRIGHT", "UPLEFT", "DOWNRIGHT", "DOWNLEFT", "FIRE", "UPFIRE", "j"]
HELD = {
    "ArrowUp": "UP",
    "ArrowUp ArrowRight": "UPRIGHT",
    "ArrowRight ArrowUp": "UPRIGHT",
    "KeyA KeyD": "RIGHT",  # of two that exclude each other the one pressed last
    "KeyS KeyA": "DOWNLEFT",
    "Space": "FIRE",
    "ArrowUp Space": "UPFIRE",
    "ArrowRight Space": "RIGHT",  # RIGHTFIRE is none of its actions
    "ArrowLeft j": "j",
    "k": None,
    "w/KeyW": "UP",
}
LETTERS = ["w", "a", "s", "d"]


def wishes(page: Page, actions: list[str]) -> dict[str, str | None]:
    """What the page's keys say of keys held together, and after all are up again."""
    script = """(async () => {
        const { Keys } = await import("./keys.js"), found = {}, heard = [];
        const keys = new Keys(name => heard.push(name), {});
        keys.setActions(ACTIONS);
        for (const held of HELD) {
            const say = (kind, word) => {
                const [key, code] = word.includes("/") ? word.split("/") : [word, word];
                dispatchEvent(new KeyboardEvent(kind, { code, key: kind === "keyup" ? key.toUpperCase() : key }));
            };
            const press = kind => held.split(" ").forEach(word => say(kind, word));
            press("keydown"); found[held] = keys.wish(); press("keyup"); found.after = keys.wish();
        }
        dispatchEvent(new KeyboardEvent("keydown", { code: "KeyW", key: "w", ctrlKey: true }));
        found.ctrl = keys.wish();
        found.buttons = [...document.querySelectorAll("#more button")].map(button => button.textContent).join(" ");
        found.hidden = [...document.querySelectorAll("#pad button:disabled")].length;
        return found; })()"""
    return page.run(script.replace("ACTIONS", json.dumps(actions)).replace("HELD", json.dumps(list(HELD))))


@pytest.mark.slow
def test_keys_go_in_and_frames_change(run: Path, tmp_path: Path) -> None:  # noqa: F811
    line = [sys.executable, "-m", "rqvae", "play", str(run), "--port", "0", "--fps", "20"]
    server = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[2]
        with chromium(tmp_path / "profile") as page:
            page.open(address)
            page.wait("document.getElementById('numbers').textContent.includes('frames/s')")
            first, number = picture(page, "dream"), frame_number(page)
            page.wait(f"Number(document.getElementById('numbers').textContent.match(/frame (\\d+)/)[1]) > {number + 3}")
            assert not np.array_equal(picture(page, "dream"), first)
            obeyed = set()
            for seed, (key, direction) in enumerate([*ARROWS.items(), *ARROWS.items()]):
                page.run(f"document.getElementById('seed').value = {seed}; document.getElementById('reset').click()")
                page.key(key, down=True)
                end = time.monotonic() + 5
                while direction not in obeyed and time.monotonic() < end and frame_number(page) < 12:
                    if facing(picture(page, "real")) == direction:
                        obeyed.add(direction)
                page.key(key, down=False)
            assert len(obeyed) >= 3, f"the real game beside the dream obeyed {obeyed} of {ARROWS}"
            page.run("document.getElementById('record').click()")
            page.wait("document.getElementById('recorded').textContent.includes('frames')")
            found = wishes(page, ATARI)
            assert {held: found[held] for held in HELD} == HELD
            assert (found["after"], found["buttons"], found["hidden"]) == (None, "FIRE j", 0)
            assert found["ctrl"] is None, "the browser's own"
            assert wishes(page, ["LEFT", "RIGHT"])["hidden"] == 2
            assert wishes(page, LETTERS)["w/KeyW"] == "w", "an action of that name before UP, which it has not"
            status = "fetch(document.getElementById('dream-zip').href).then(answer => answer.status)"
            assert page.run(status) == 200
            page.wait("document.getElementById('numbers').textContent.includes('keys heard after')")
            page.screenshot(Path(os.environ.get("RQVAE_SCREENSHOTS", tmp_path), "play.png"))
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)
    finally:
        server.kill()
