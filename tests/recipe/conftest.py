"""A recipe that loads, in the current folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from written import GOOD, write


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write(tmp_path, GOOD)
