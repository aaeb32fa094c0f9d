"""A page in headless Chromium, where there is one: its document after its scripts have run, and what the console said."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
_MESSAGE = re.compile(r"INFO:CONSOLE[^\"]*\"(.*)\", source:")


class Seen(NamedTuple):
    document: str
    console: list[str]  # errors, and requests that the page's own policy or the missing network refused


def see(page: Path, state: str = "", *, width: int | None = None) -> Seen:
    """Open a file from the disk, with no network; `state` follows the `#` of its address.

    With `width` the page lies in a frame that many pixels wide (a window is never narrower than 500), and the document is
    that of the frame's owner: `data-overflow` says by how many pixels the page is wider than its frame.
    """
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    if width is not None:
        page = _framed(page, width)
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", *QUIET, f"--user-data-dir={page}.profile"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    address = f"{page.resolve().as_uri()}{'#' if state else ''}{state}"
    done = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=240, check=True)
    return Seen(done.stdout, _MESSAGE.findall(done.stderr))


def _framed(page: Path, width: int) -> Path:
    frame = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page.read_text(encoding="utf-8"))}">'
    script = (
        "onload = () => { const page = document.querySelector('iframe').contentDocument.documentElement;"
        "document.documentElement.dataset.overflow = page.scrollWidth - page.clientWidth;"
        "document.documentElement.dataset.charts = page.querySelectorAll('.main-svg').length; };"
    )
    outer = page.with_suffix(f".{width}.html")
    outer.write_text(f"<!DOCTYPE html><meta charset=utf-8>{frame}</iframe><script>{script}</script>", encoding="utf-8")
    return outer
