"""A page in headless Chromium that a test can use as a person would: type, click, wait, look; and what the page asked for.

Spoken through Chromium's pipe, so that neither a port nor a driver is needed.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from browser import NAMES, QUIET

_PATIENCE = 120  # seconds for one answer or one change of the page, on a machine that has others to serve


class Page:
    """One page. Use as `with Page(folder) as page`, where `folder` may keep the browser's profile.

    Attributes:
        requests: addresses that the page has asked for.
        console: what its console said as an error.
    """

    def __init__(self, folder: Path, width: int = 1280, height: int = 900) -> None:
        program = next(filter(None, map(shutil.which, NAMES)), None)
        if program is None:
            pytest.skip("no Chromium on this machine")
        self.requests: list[str] = []
        self.console: list[str] = []
        self._last, self._rest = 0, b""
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", *QUIET]
        command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        moved = ["bash", "-c", f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}']  # the numbers that Chromium speaks on
        self._process = subprocess.Popen(
            [*moved, *command], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Runtime", "Page", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its answer."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            told = self._read()
            if told.get("id") == self._last:
                assert "error" not in told, told
                return told["result"]
            self._note(told)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], _PATIENCE)
            piece = os.read(self._from, 1 << 20) if ready else b""
            assert piece, "Chromium has gone or does not answer"
            self._rest += piece
        one, _, self._rest = self._rest.partition(b"\0")
        return json.loads(one)

    def _note(self, told: dict[str, Any]) -> None:
        method, said = told.get("method"), told.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.console.append(json.dumps(said["exceptionDetails"])[:500])
        elif method == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.console.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled" and said["type"] == "error":
            self.console.append(json.dumps(said["args"])[:500])

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Until the expression is true."""
        end = time.monotonic() + _PATIENCE
        while not self.evaluate(f"!!({script})"):  # an element has no value of its own here
            assert time.monotonic() < end, (
                f"{script}: never; {self.console}; {self.evaluate('document.body.innerText')}"
            )
            time.sleep(0.1)

    def open(self, address: str) -> None:
        self.send("Page.navigate", url=address)

    def paste(self, element: str, text: str) -> None:
        """Replace the text of an element, given as a JavaScript expression."""
        self.evaluate(f"{element}.focus(); {element}.select()")
        self.send("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
