"""A headless Chromium for tests, driven by its own DevTools protocol: no driver, no package but a websocket client."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--remote-debugging-port=0",
)


class Page:
    """One tab."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._numbers = socket, itertools.count(1)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol and its answer; events are passed over."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, a promise's once it is there."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """The value of an expression once it is true; what is not there yet is not true."""
        end = time.monotonic() + seconds
        script = f"(() => {{ try {{ return {script}; }} catch {{ return false; }} }})()"
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{script}: not true within {seconds} s; the page says: {self.text()}"
            time.sleep(0.05)
        return value

    def text(self) -> str:
        return str(self.run("document.body ? document.body.innerText : ''"))

    def key(self, code: str, down: bool) -> None:
        """A key goes down or up, as the keyboard would say it."""
        kind = "rawKeyDown" if down else "keyUp"
        self.call("Input.dispatchKeyEvent", type=kind, key=code, code=code)

    def pixels(self, canvas: str) -> list[int]:
        """RGBA numbers of a canvas."""
        return self.run(
            f"(() => {{ const c = document.getElementById('{canvas}'); "
            "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
        )

    def screenshot(self, path: Path) -> Path:
        answer = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))
        return path


@contextlib.contextmanager
def chromium(folder: Path, size: tuple[int, int] = (1100, 900)) -> Iterator[Page]:
    """A tab of a new Chromium; skips the test, with the reason, where there is none.

    Args:
        folder: of its profile.
        size: of the window.
    """
    client = pytest.importorskip("websockets.sync.client", reason="websockets comes with uvicorn[standard]")
    httpx = pytest.importorskip("httpx")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH (Debian: apt-get install chromium)")
    line = [program, *FLAGS, f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}", "about:blank"]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        note, end = folder / "DevToolsActivePort", time.monotonic() + 60
        while not (note.exists() and note.read_text().count("\n")):
            assert time.monotonic() < end, "chromium does not start"
            assert process.poll() is None, f"chromium ended with {process.returncode}"
            time.sleep(0.05)
        port = note.read_text().split()[0]
        tabs = httpx.get(f"http://127.0.0.1:{port}/json").json()
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        with client.connect(address, max_size=None, origin=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        process.kill()
