"""Saves in these tests are quick, and none is interrupted by an earlier test's doing."""

from __future__ import annotations

import pytest

from engine.runtime import atomic


@pytest.fixture(autouse=True)
def quick_and_clean(monkeypatch):
    """Flushing to a real disk takes most of a save's time and shows only in a power cut, which no test makes."""
    monkeypatch.setattr(atomic.os, "fsync", lambda handle: None)
    yield
    atomic.fail_points.clear()
