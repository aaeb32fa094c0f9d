"""Every end has its exit code and one line, printed by the rank that had the error."""

from __future__ import annotations

import sys

import pytest

from engine.errors import EngineError
from engine.runtime import exits
from engine.runtime.exits import Outcome, classify, main_guard
from engine.runtime.signals import Stopped


def torch_out_of_memory():
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def dist_error():
    from torch.distributed import DistNetworkError

    return DistNetworkError("Connection reset by peer")


CODES = [
    (lambda: EngineError("E3.1", "bad row"), 3),
    (torch_out_of_memory, 8),
    (lambda: MemoryError(), 8),
    (lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 TB"), 8),
    (dist_error, 9),
    (lambda: RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:525] Connection closed by peer"), 9),
    (lambda: RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:1"), 9),
    (lambda: OSError(28, "No space left on device", "/x/metrics.jsonl"), 6),
    (lambda: ValueError("anything"), 1),
    (lambda: KeyboardInterrupt(), 76),
    (lambda: Stopped("stopped by SIGTERM after step 3", saved=True), 75),
    (lambda: Stopped("stopped by SIGTERM", saved=False), 76),
]


@pytest.mark.parametrize(("error", "code"), CODES, ids=range(len(CODES)))
def test_every_exception_has_its_exit_code(error, code, capsys):
    def main():
        raise error()

    assert main_guard(main) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert (len(lines) == 1) == (code != 1), "a traceback is for bugs only"
    assert main_guard(lambda: None) == 0 and main_guard(lambda: 3) == 3


def test_traceback_on_request(monkeypatch, capsys):
    def main():
        raise EngineError("E2.1", "bad recipe", "a.yaml:3", "fix it")

    assert main_guard(main) == 2
    assert capsys.readouterr().err == "error E2.1: bad recipe | a.yaml:3 | nothing was started | fix it\n"
    monkeypatch.setattr(sys, "argv", ["train.py", "--traceback"])
    assert main_guard(main) == 2
    assert "Traceback" in capsys.readouterr().err


def test_out_of_memory_tells_the_shapes_and_a_way_out():
    text = str(classify(torch_out_of_memory(), {"input_ids": (8, 512)}))
    assert "input_ids (8, 512)" in text and "per_device_train_batch_size" in text


def test_outcomes_are_remembered_for_the_command_line(tmp_path, monkeypatch, capsys):
    """Of several ranks only the owner of an error prints it."""
    error = EngineError("E3.1", "bad row", safe="")
    exits.note(error, Outcome(6, "error E6.1: disk full", owner=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in ((0, ""), (1, "[rank 1] error E6.1: disk full\n")):
        monkeypatch.setenv("RANK", str(rank))
        left = []
        monkeypatch.setattr(exits, "_leave", left.append)

        def main():
            raise error

        main_guard(main)
        assert left == [6] and capsys.readouterr().err == said
