"""The process around a run: exit codes, run folders, status files, signals, and what ranks tell each other."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from engine.errors import EngineError
from engine.recipe.schema import Recipe
from engine.runtime import console, exits, process, run_folder
from engine.runtime import signals as runtime_signals
from engine.runtime.exits import Outcome, classify, main_guard
from engine.runtime.ranks import RankGroup, as_engine_error
from engine.runtime.run_folder import choose_run_folder
from engine.runtime.run_status import RunStatus
from engine.runtime.signals import Stopped, StopSignal


def recipe_for(tmp_path: Path, **experiment) -> Recipe:
    recipe = Recipe()
    recipe.experiment.output_root = str(tmp_path / "experiments")
    recipe.runtime.device = "cpu"
    for key, value in experiment.items():
        setattr(recipe.experiment, key, value)
    return recipe


# Exit codes


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
    import torch

    text = str(classify(torch_out_of_memory(), {"input_ids": torch.zeros(8, 512)}))
    assert "input_ids (8, 512)" in text and "per_device_train_batch_size" in text


def test_help_needs_no_torch():
    """Importing the rooms that every command line imports stays light."""
    code = "import sys, engine.runtime, engine.checkpoints; sys.exit('torch' in sys.modules or 'accelerate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Starting


def test_settings_the_machine_cannot_serve(tmp_path, monkeypatch, caplog):
    recipe = recipe_for(tmp_path)
    recipe.training.precision = "fp16"
    with pytest.raises(EngineError, match=r"error E2\.44"):
        process.start(recipe)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(EngineError, match=r"error E2\.40"):
        process.start(recipe_for(tmp_path))


def test_a_missing_gpu_is_a_warning(monkeypatch, caplog):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING, logger="engine"):
        assert process._choose_device("cuda:1") == "cpu" and process._choose_device("auto") == "cpu"
    assert sum("no usable CUDA" in record.message for record in caplog.records) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert process._choose_device("auto") == "cuda" and process._choose_device("cuda:0") == "cuda:0"
    with pytest.raises(EngineError, match=r"error E2\.41"):
        process._choose_device("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EngineError, match=r"error E2\.42"):
        process._choose_device("cuda:0")


def test_precision_is_resolved(monkeypatch):
    import torch

    assert process._choose_precision("auto", "cpu", False) == "fp32"
    assert process._choose_precision("fp16", "cpu", True) == "fp16"
    for has_bf16, resolved in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_bf16, **kw: has)
        assert process._choose_precision("auto", "cuda", False) == resolved
    with pytest.raises(EngineError, match=r"error E2\.43"):
        process._choose_precision("bf16", "cuda", False)


def test_the_environment_cannot_change_accumulation_or_precision(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with process.start(recipe_for(tmp_path)) as started:
        assert started.accelerator.gradient_accumulation_steps == 1
        assert started.accelerator.mixed_precision == "no" and started.precision == "fp32"
        assert not started.scaler().is_enabled()


def test_emulated_fp16_is_real_on_the_cpu(tmp_path):
    """Accelerate alone would report fp16 and compute in fp32."""
    import torch

    recipe = recipe_for(tmp_path)
    recipe.training.precision, recipe.runtime.emulate_fp16_on_cpu = "fp16", True
    with process.start(recipe) as started:
        with started.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16
        scaler = started.scaler()
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scaler.scale((weight * 1e38).sum()).backward()  # 65,536 times this is infinite
        scaler.step(optimizer)
        scaler.update()
        assert weight.item() == 1.0 and scaler.get_scale() == 2.0**15, "the overflow was skipped, the scale fell"


def test_random_state_round_trip(tmp_path):
    import random

    import numpy
    import torch

    def draw():
        return random.random(), numpy.random.rand(), torch.rand(3).tolist()

    with process.start(recipe_for(tmp_path)) as started:
        state = started.random_state()
        first = draw()
        started.restore_random_state(state)
        assert draw() == first
        started.seed_ranks(42)
        assert draw() != first


# Run folders


def test_dated_folders_do_not_collide(tmp_path):
    recipe = recipe_for(tmp_path, name="kobart")
    first, second = choose_run_folder(recipe, None), choose_run_folder(recipe, None)
    assert first.path != second.path and not first.reused
    day, name = first.path.parts[-2:]
    assert name.startswith(day + "_") and name.endswith("_kobart") and len(name) == len("20250101_120000_kobart")


def test_a_folder_with_a_run_needs_resume(tmp_path):
    recipe = recipe_for(tmp_path, output_dir=str(tmp_path / "run"))
    folder = choose_run_folder(recipe, None)
    assert folder.path.is_dir() and not folder.reused
    (folder.path / "train.log").write_text("a run that failed before its first update\n")
    (folder.path / "run_status.json").write_text('{"code": 3}')
    assert choose_run_folder(recipe, None).reused
    for trace in ("metrics.jsonl", "results.json"):
        (folder.path / trace).write_text("{}\n")
        with pytest.raises(EngineError, match=r"error E2\.31"):
            choose_run_folder(recipe, None)
        assert choose_run_folder(recipe, "auto").reused
        (folder.path / trace).unlink()
    (folder.path / "checkpoint-5").symlink_to("/")
    with pytest.raises(EngineError, match=r"error E2\.31"):
        choose_run_folder(recipe, None)


def test_auto_finds_the_newest_run_of_that_name(tmp_path):
    recipe = recipe_for(tmp_path, name="a")
    fresh = choose_run_folder(recipe, "auto")
    assert not fresh.reused
    root = tmp_path / "experiments"
    for name in ("20250101/20250101_120000_a", "20250102/20250102_120000_a", "20250102/20250102_120000_a-2",
                 "20250103/20250103_120000_ab", "20250104/20250104_120000_a"):  # fmt: skip
        (root / name).mkdir(parents=True)
        if not name.startswith("20250104"):  # that one never got as far as a status
            (root / name / "run_status.json").write_text('{"code": null}')
    fresh.path.rmdir()
    assert choose_run_folder(recipe, "auto").path == root / "20250102" / "20250102_120000_a-2"


def test_a_finished_run_is_complete(tmp_path):
    recipe = recipe_for(tmp_path, output_dir=str(tmp_path / "run"))
    with process.start(recipe) as started:
        started.open_run(recipe)
        (tmp_path / "run" / "results.json").write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    with process.start(recipe) as started:
        assert started.open_run(recipe, "auto").finished
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}


def test_resume_paths(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint-5").mkdir(parents=True)
    (run / "run_status.json").write_text('{"code": null}')
    recipe = recipe_for(tmp_path)
    assert choose_run_folder(recipe, str(run / "checkpoint-5")).path == run
    assert choose_run_folder(recipe, str(run)).path == run
    (run / ".tmp-checkpoint-6-0a").mkdir()
    (run / "checkpoint-7").symlink_to(tmp_path)
    for bad in ("nothing", "run/checkpoint-6", "run/.tmp-checkpoint-6-0a", "run/checkpoint-7"):
        with pytest.raises(EngineError) as caught:
            choose_run_folder(recipe, str(tmp_path / bad))
        assert caught.value.exit_code == 5, bad
    with pytest.raises(EngineError, match=r"error E2\.32"):
        choose_run_folder(recipe_for(tmp_path, output_dir=str(tmp_path / "other")), str(run / "checkpoint-5"))


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for bad, code in ((tmp_path / "file", 2), (tmp_path / "file" / "below", 2), (Path("/proc/nowhere"), 6)):
        with pytest.raises(EngineError) as caught:
            choose_run_folder(recipe_for(tmp_path, output_dir=str(bad)), None)
        assert caught.value.exit_code == code, bad
    monkeypatch.setattr(run_folder, "free_bytes", lambda folder: 1000)
    with pytest.raises(EngineError, match="not enough space for this run"):
        choose_run_folder(recipe_for(tmp_path, output_dir=str(tmp_path / "run")), None)


# Status file and log


def test_the_status_file_tells_how_it_ended(tmp_path):
    recipe = recipe_for(tmp_path, output_dir=str(tmp_path / "run"))

    def status():
        return json.loads((tmp_path / "run" / "run_status.json").read_text())

    with pytest.raises(EngineError), process.start(recipe) as started:
        started.open_run(recipe)
        assert status()["code"] is None, "a run that is killed now must not look finished"
        started.status.step, started.status.last_checkpoint = 7, "checkpoint-5"
        raise EngineError("E7.1", "loss nan", safe="")
    assert status() == {"code": 7, "reason": "error E7.1: loss nan", "step": 7, "last_checkpoint": "checkpoint-5",
                        "resumable": True}  # fmt: skip
    with pytest.raises(Stopped), process.start(recipe) as started:
        started.open_run(recipe, "auto")
        started.stop(saved=True)
    assert status()["code"] == 75
    with process.start(recipe) as started:
        started.open_run(recipe, "auto")
    assert status()["code"] == 0 and status()["resumable"] is False
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_failed_save_while_stopping_is_76(tmp_path):
    recipe = recipe_for(tmp_path, output_dir=str(tmp_path / "run"))
    with pytest.raises(EngineError) as caught, process.start(recipe) as started:
        started.open_run(recipe)
        started.signals.enter_loop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert started.requests() == runtime_signals.STOP
        raise EngineError("E6.1", "disk full")
    assert caught.value.outcome.code == 76
    assert "disk full" in json.loads((tmp_path / "run" / "run_status.json").read_text())["reason"]


def test_a_stop_that_is_killed_before_it_is_done_reads_as_unsaved(tmp_path):
    recipe = recipe_for(tmp_path, output_dir=str(tmp_path / "run"))
    with pytest.raises(Stopped), process.start(recipe) as started:
        started.open_run(recipe)
        started.signals.enter_loop()
        assert started.requests() == runtime_signals.NOTHING
        os.kill(os.getpid(), signal.SIGTERM)
        started.requests()
        assert json.loads((tmp_path / "run" / "run_status.json").read_text())["code"] == 76
        started.stop(saved=True)
    assert json.loads((tmp_path / "run" / "run_status.json").read_text())["code"] == 75


def test_the_log_holds_early_lines_and_no_colours(tmp_path, capsys):
    recipe = recipe_for(tmp_path, output_dir=str(tmp_path / "run"))
    with process.start(recipe) as started:
        logging.getLogger("engine").warning("said before there was a folder")
        started.open_run(recipe)
        logging.getLogger("engine.train").info("가나다 " * 60)
    text = (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    assert "said before there was a folder" in text and "가나다" in text and "\x1b" not in text
    shown = capsys.readouterr().err
    assert "warning: said before" in shown and max(map(len, shown.splitlines())) <= 100


def test_wrapping_counts_columns():
    from unicodedata import east_asian_width

    text = "  " + "요약은 짧고 정확하게 " * 20 + "x" * 130 + " end"
    lines = console.wrap(text, 100)
    assert " ".join(line.strip() for line in lines) == text.strip() and lines[0].startswith("  요약은")
    widths = [sum(2 if east_asian_width(letter) in "WF" else 1 for letter in line) for line in lines]
    assert [width for width in widths if width > 100] == [132], "a word longer than a line stays whole"
    assert console.wrap("", 100) == [""] and console.wrap("a  b   c", 100) == ["a  b   c"]


# Signals


@pytest.fixture
def signals():
    given_up = []
    catcher = StopSignal(given_up.append)
    catcher.given_up = given_up
    catcher.open()
    yield catcher
    catcher.close()


def test_before_the_loop_a_signal_unwinds_at_once(signals):
    with pytest.raises(Stopped) as caught:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert not caught.value.saved and "SIGINT before the first update" in str(caught.value)


def test_in_the_loop_signals_wait_for_the_boundary(signals):
    signals.enter_loop()
    assert signals.take() == runtime_signals.NOTHING
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signals.take() == runtime_signals.SAVE and signals.take() == runtime_signals.NOTHING, "one request, one save"
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signals.take() == runtime_signals.STOP and signals.take() == runtime_signals.STOP and signals.stopping
    os.kill(os.getpid(), signal.SIGTERM)  # Ctrl-C reaches a worker from the terminal and from its launcher
    time.sleep(0.2)
    assert signals.given_up == []
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)
    assert len(signals.given_up) == 1


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    catcher = StopSignal(lambda reason: None)
    catcher.open()
    assert signal.getsignal(signal.SIGTERM) != before[0]
    catcher.close()
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    worker = threading.Thread(target=catcher.open)  # where Python cannot catch signals, nothing happens
    worker.start()
    worker.join()
    assert signal.getsignal(signal.SIGTERM) == before[0]


# Ranks: threads stand in for processes, around an in-process store


def in_ranks(world: int, task, timeout: float = 5.0, run_out: float = 30.0):
    """Call task(group) on `world` ranks at once; returns each one's result or exception."""
    from torch.distributed import HashStore

    store = HashStore()
    store.set_timeout(timedelta(seconds=2))
    results = [None] * world

    def rank_main(rank):
        group = RankGroup(rank, world, timeout=timeout, store=store)
        try:
            results[rank] = task(group)
        except BaseException as error:
            results[rank] = error
        finally:
            group.close()

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(run_out)
    return results


def test_gather_keeps_rank_order_and_types():
    rows = in_ranks(3, lambda ranks: ranks.gather([{"rank": ranks.rank, "text": "요약"}, None, 0.1 + 0.2]))
    assert rows[0] == rows[1] == rows[2]
    assert [row["rank"] for row in rows[0][::3]] == [0, 1, 2] and rows[0][2] == 0.1 + 0.2
    assert in_ranks(2, lambda ranks: ranks.gather(["ab"] * (ranks.rank + 1)))[0] == ["ab"] * 3, "unequal lengths"
    assert RankGroup().gather(["ab"]) == ["ab"], "a string is no list of letters, on one rank either"


def test_broadcast_carries_more_than_a_store_value_may_hold():
    text = "가" * 4_000_000
    assert in_ranks(2, lambda ranks: ranks.broadcast(text if ranks.is_main else None)) == [text, text]


def test_one_rank_may_be_much_later_than_the_timeout():
    def task(ranks):
        if ranks.rank == 1:
            time.sleep(3)  # alive and busy: its heartbeat goes on
        ranks.wait_for_all("decoding")
        return "met"

    assert in_ranks(2, task, timeout=1.0) == ["met", "met"]


def test_many_exchanges_leave_nothing_in_the_store():
    def task(ranks):
        for number in range(200):
            assert ranks.broadcast(number) == number
        return ranks._store.num_keys()

    assert max(in_ranks(2, task)) < 12


def test_the_owner_of_a_failure_decides_for_all():
    def task(ranks):
        with ranks.together("reading data"):
            if ranks.rank == 1:
                raise EngineError("E3.4", "row 7 is empty", safe="")
        return "went on"

    results = in_ranks(3, task)
    assert [type(result) for result in results] == [EngineError] * 3
    assert {str(result) for result in results} == {"error E3.4: row 7 is empty"}
    assert {result.owner for result in results} == {1}


def test_of_several_failures_the_lowest_rank_speaks():
    def task(ranks):
        with ranks.together("reading data"):
            raise ValueError(f"rank {ranks.rank}")

    results = in_ranks(2, task)
    assert {str(result) for result in results} == {str(results[0])} and "rank 0" in str(results[0])


def test_a_failure_reaches_ranks_that_wait_elsewhere():
    def task(ranks):
        if ranks.rank == 1:
            ranks.report(as_engine_error(EngineError("E7.1", "loss nan"), 1))
            return "left"
        ranks.wait_for_all("somewhere")
        return "never"

    began = time.monotonic()
    results = in_ranks(2, task, timeout=60)
    assert results[1] == "left" and "loss nan" in str(results[0]) and results[0].owner == 1
    assert time.monotonic() - began < 10


def test_a_silent_rank_is_lost_after_the_timeout():
    def task(ranks):
        if ranks.rank == 1:
            ranks.close()  # as if killed or frozen: no more heartbeats
            return "gone"
        ranks.wait_for_all("update 3")
        return "never"

    began = time.monotonic()
    result = in_ranks(2, task, timeout=1.5)[0]
    assert result.exit_code == 9 and "rank 1" in str(result) and "update 3" in str(result)
    assert time.monotonic() - began < 10


def test_ranks_at_different_points_are_told():
    results = in_ranks(2, lambda ranks: ranks.wait_for_all(f"point {ranks.rank}"))
    assert all(result.exit_code == 9 and "different points" in str(result) for result in results)


def test_ranks_that_disagree_do_not_start():
    results = in_ranks(2, lambda ranks: ranks.require_equal({"recipe": "same", "seed": ranks.rank}))
    assert all(result.exit_code == 9 and "disagree about seed" in str(result) for result in results)


_FROZEN_HOST = """
import os, sys, time
sys.path.insert(0, {root!r})
from datetime import timedelta
from torch.distributed import TCPStore
from engine.runtime.ranks import RankGroup
rank, port = int(sys.argv[1]), int(sys.argv[2])
store = TCPStore("127.0.0.1", port, 2, rank == 0, timeout=timedelta(seconds=30), wait_for_workers=False)
if rank == 0:
    print(store.port, flush=True)
ranks = RankGroup(rank, 2, timeout=6, store=store)
ranks.store_is_dead = lambda reason: (print(reason, flush=True), os._exit(9))
ranks.wait_for_all("start")
print("met", flush=True)
time.sleep(60) if rank == 0 else ranks.wait_for_all("never")
"""


def test_a_frozen_host_of_the_store_is_noticed(root):
    """Requests to a store have no time limit: a thread has to keep the time."""
    command = [sys.executable, "-c", _FROZEN_HOST.format(root=str(root))]
    host = subprocess.Popen([*command, "0", "0"], stdout=subprocess.PIPE, text=True)
    try:
        port = host.stdout.readline().strip()
        other = subprocess.Popen([*command, "1", port], stdout=subprocess.PIPE, text=True)
        assert host.stdout.readline() == "met\n"
        host.send_signal(signal.SIGSTOP)
        output, _ = other.communicate(timeout=30)
        assert other.returncode == 9 and "has not answered for 6 s" in output
    finally:
        host.kill()
        host.wait()


def test_outcomes_are_remembered_for_the_command_line(tmp_path, monkeypatch, capsys):
    """Of several ranks only the owner of an error prints it."""
    error = EngineError("E3.1", "bad row", safe="")
    error.owner = 1
    error.outcome = Outcome.of(error)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in ((0, ""), (1, "[rank 1] error E3.1: bad row\n")):
        monkeypatch.setenv("RANK", str(rank))
        left = []
        monkeypatch.setattr(exits, "_leave", left.append)

        def main():
            raise error

        main_guard(main)
        assert left == [3] and capsys.readouterr().err == said


def test_a_rank_that_fails_leaves_its_own_status(tmp_path):
    status = RunStatus(rank=1)
    status.open(tmp_path)
    status.write(0, "done")
    assert list(tmp_path.iterdir()) == [], "rank 0 speaks for all when all is well"
    status.write(9, "lost")
    assert json.loads((tmp_path / "run_status.rank1.json").read_text())["code"] == 9
    RunStatus(rank=0).open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run_status.json"], "a new attempt forgets old failures"
