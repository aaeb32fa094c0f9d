"""The kill and fault campaign in its short form, and the proof that it would notice."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
ALARM = """
import sys
sys.path[:0] = [{root!r}, {tools!r}]
import fault_campaign
import engine.runtime.process
engine.runtime.process.Runtime.restore_random_state = lambda self, state: None
fault_campaign.faults = lambda *arguments: None
sys.argv = ["fault_campaign.py", "--trials", "10", "--points", "2", "--models", "full", "--ranks", "1"]
sys.exit(fault_campaign.main())
"""


def program(*command: str, timeout: int = 600) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=timeout, check=False, env=dict(os.environ)
    )


def test_short_campaign(root):
    """A few kills on either of two ranks, failing disks, stops, a frozen rank, errors of one rank: nothing is lost."""
    tool = str(root / "tools" / "fault_campaign.py")
    done = program(tool, "--trials", "4", "--points", "2", "--stops", "1", "--models", "adapter", "--ranks", "2")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    counts = dict(line.strip().rsplit(": ", 1) for line in done.stdout.splitlines() if ": " in line and "{" not in line)
    assert int(counts["kills"]) >= 4 and int(counts["resumes"]) >= 4 and int(counts["mismatches"]) == 0
    assert int(counts["runs without a valid checkpoint"]) == int(counts["leftovers"]) == int(counts["findings"]) == 0


def test_the_campaign_notices_a_resume_that_is_not_exact(root):
    """Dropout that goes on from another random state must show as a mismatch."""
    done = program("-c", ALARM.format(root=str(root), tools=str(root / "tools")))
    assert done.returncode == 1 and "logged rows differ" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
