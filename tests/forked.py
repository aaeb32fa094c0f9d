"""Many training runs of one or two CPU ranks, forked from one process that has imported everything: seconds, not minutes.

python tests/forked.py PLAN.json        [[ranks, arguments of engine/train.py, log file], ...]
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]


def run_all(plan: Sequence[tuple[int, list[str]]], folder: Path) -> None:
    """Run all of `plan`, pairs of ranks and arguments; every one must end with code 0. Logs go to `folder`."""
    logs = [folder / f"forked-{number}.log" for number in range(len(plan))]
    listed = [[ranks, arguments, str(log)] for (ranks, arguments), log in zip(plan, logs, strict=True)]
    (folder / "plan.json").write_text(json.dumps(listed), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder / "plan.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + "".join(log.read_text()[-2000:] for log in logs if log.exists())


def _run(ranks: int, arguments: list[str], log: Path) -> list[int]:
    """Exit statuses of the ranks of one run."""
    import fault_lab

    setting, plan = fault_lab.Setting("", ranks), fault_lab.Plan()
    server, port = fault_lab.host_store() if ranks > 1 else (None, 0)
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            fault_lab.become_rank(rank, setting, port, log, plan, log, arguments)
        pids.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if server is not None:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    return statuses


if __name__ == "__main__":
    import fault_lab

    fault_lab.import_once()
    for ranks, arguments, log in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        if any(statuses := _run(ranks, arguments, Path(log))):
            sys.exit(f"{arguments}: ended with {statuses}, see {log}")
