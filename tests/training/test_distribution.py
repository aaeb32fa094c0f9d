"""Several ranks: sharded or whole, they train, save, resume and decode what one rank does."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import forked
import own_code
import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file

from engine.errors import EngineError
from engine.recipe.load import load_recipe
from engine.training import distribution

ADAPTER = {"lora__enabled": True, "lora__dropout": 0.0}
CHANGED = ("world_size", "training.per_device_train_batch_size", "distributed.strategy")


def recipe(folder, family, **changes):
    """27 rows in windows of 8 on any number of ranks: the last holds 3, so that one rank has fewer micro-batches."""
    return runs.write_recipe(
        folder,
        family,
        rows=27,
        model__dropout=0.0,
        training__gradient_accumulation_steps=2,
        training__max_grad_norm=0.5,
        checkpoint__save_total_limit=None,
        checkpoint__strategy="steps",
        checkpoint__steps=1,
        **changes,
    )


def arguments(path, ranks, run):
    strategy = "fsdp" if ranks > 1 else "auto"
    rows = f"training.per_device_train_batch_size={4 // ranks}"
    return [str(path), f"distributed.strategy={strategy}", rows, f"experiment.output_dir={run}"]


def weights(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def predictions(run):
    return {path.name: path.read_bytes() for path in (run / "predictions").iterdir()}


def assert_equal(ours, theirs):
    rows, peers = runs.rows_of(ours), runs.rows_of(theirs)
    assert len(rows) == len(peers) == 4
    for row, peer in zip(rows, peers, strict=True):
        assert row["loss"] == pytest.approx(peer["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(peer["grad_norm"], rel=1e-5)
        assert row["sample_ids_sha256"] == peer["sample_ids_sha256"]
    mine, peers = weights(ours / "final_model"), weights(theirs / "final_model")
    assert mine.keys() == peers.keys() and mine
    assert max(float((mine[name] - peers[name]).abs().max()) for name in mine) < 1e-5
    assert predictions(ours) == predictions(theirs)
    names = {"config.json", "adapter_config.json", "generation_config.json"}
    configs = [
        {path.name: path.read_bytes() for path in (run / "final_model").iterdir() if path.name in names}
        for run in (ours, theirs)
    ]
    assert configs[0].keys() == configs[1].keys() and configs[0].get("config.json") == configs[1].get("config.json")


CASES = {
    "bart": ("bart", {}),
    "t5": ("t5", {}),
    "llama-lora": ("llama", ADAPTER),
    "qwen3": ("qwen3", {"training__gradient_checkpointing": True, "distributed__cpu_offload": True}),
}
if "FULL_TESTS" in os.environ:
    CASES |= {
        "bart-tokens": ("bart", {"data__batching": "tokens", "data__tokens_per_batch": 250}),
        "bart-random": ("bart", {"model__init": "random"}),
        "llama": ("llama", {}),
    }


@pytest.mark.slow
def test_two_sharded_ranks_equal_one(tmp_path):
    """And their checkpoints are plain: begun by two and ended by one, or the other way round, is still the same run."""
    recipes = {name: recipe(tmp_path / name, family, **changes) for name, (family, changes) in CASES.items()}
    plan = [(n, arguments(path, n, tmp_path / f"{name}-{n}")) for name, path in recipes.items() for n in (1, 2)]
    forked.run_all(plan, tmp_path)
    for name in CASES:
        assert_equal(tmp_path / f"{name}-2", tmp_path / f"{name}-1")

    changed = [word for key in CHANGED for word in ("--allow-change", key)]
    plan = []
    for ranks, source, more in ((2, 2, []), (2, 1, changed), (1, 2, changed)):
        run = tmp_path / f"from-{source}-to-{ranks}"
        # As it stood after its second update
        done = shutil.ignore_patterns("final_model", "run_status.json", "results.json")
        shutil.copytree(tmp_path / f"bart-{source}", run, ignore=done)
        resume = ["--resume", str(run / "checkpoint-2"), *more]
        plan.append((ranks, arguments(recipes["bart"], ranks, run) + resume))
    forked.run_all(plan, tmp_path)
    assert_equal(tmp_path / "from-1-to-2", tmp_path / "bart-1")
    assert_equal(tmp_path / "from-2-to-1", tmp_path / "bart-1")
    again, first = tmp_path / "from-2-to-2", tmp_path / "bart-2"
    assert numbers(again) == numbers(first)
    kept = weights(first / "final_model")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights(again / "final_model").items())


def numbers(run):
    return [{name: row[name] for name in ("step", "loss", "grad_norm", "learning_rate")} for row in runs.rows_of(run)]


def runtime(world_size, irregular=False):
    ranks = SimpleNamespace(any_rank=lambda flag: flag, together=lambda name: _Nothing())
    device = torch.device("cpu")
    return SimpleNamespace(world_size=world_size, ranks=ranks, device=device, precision="fp32")


class _Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


@pytest.mark.parametrize(
    ("strategy", "ranks", "too_large", "expected"),
    [
        ("fsdp", 1, True, False),
        ("fsdp", 2, False, True),
        ("ddp", 2, True, False),
        ("auto", 1, True, False),
        ("auto", 2, False, False),
        ("auto", 2, True, True),
    ],
)
def test_who_is_sharded(tmp_path, monkeypatch, strategy, ranks, too_large, expected):
    loaded = load_recipe(runs.write_recipe(tmp_path, distributed__strategy=strategy))
    monkeypatch.setattr(distribution.memory, "exceeds", lambda estimate, device: too_large)
    assert distribution.sharded(loaded, runtime(ranks)) is expected


def test_auto_never_shards_what_cannot_be(tmp_path, monkeypatch):
    loaded = load_recipe(runs.write_recipe(tmp_path, training__optim="adamw_8bit"))
    monkeypatch.setattr(distribution.memory, "exceeds", lambda estimate, device: True)
    assert distribution.sharded(loaded, runtime(2)) is False


def test_auto_goes_on_and_says_so_where_memory_cannot_be_estimated(tmp_path, monkeypatch, caplog):
    def fails(*arguments, **settings):
        raise KeyError("a configuration like no other")

    monkeypatch.setattr(distribution.memory, "estimate", fails)
    assert distribution.sharded(load_recipe(runs.write_recipe(tmp_path)), runtime(2)) is False
    assert any("no memory estimate" in line.message for line in caplog.records if line.levelname == "WARNING")


@pytest.mark.parametrize("too_large", [True, False])
def test_auto_estimates_a_model_with_code_of_its_own(tmp_path, monkeypatch, too_large):
    own_code.save(tmp_path / "model", tmp_path / "ran", monkeypatch)
    flags = ["model.trust_remote_code=true", f"model.revision={own_code.PINNED}"]
    loaded = load_recipe(runs.write_recipe(tmp_path, "llama"), flags)
    monkeypatch.setattr(distribution.memory, "exceeds", lambda estimate, device: too_large)
    assert distribution.sharded(loaded, runtime(2)) is too_large


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.optim=adamw_8bit", "torch's AdamW only"),
        ("training.auto_batch_size=true", "cannot try batches out"),
        ("quantization.load_in_4bit=true", "4-bit weights"),
    ],
)
def test_refused_beside_sharding(tmp_path, override, words):
    path = runs.write_recipe(tmp_path, distributed__strategy="fsdp")
    with pytest.raises(EngineError, match=words) as caught:
        load_recipe(path, [override])
    assert caught.value.exit_code == 2


def built_by(monkeypatch, rank, digest_of_rank_0):
    """Where each build of a rank put its weights; the meta device gives this rank another layout, or fails."""
    places = []

    def build(recipe, *, device, precision):
        places.append(device.type)
        return SimpleNamespace(model=tiny.model("bart").to(device))

    monkeypatch.setattr(distribution, "build_model", build)
    ranks = SimpleNamespace(together=lambda name: _Nothing(), exchange=lambda name, own: [digest_of_rank_0 or own, own])
    stand_in = SimpleNamespace(ranks=ranks, is_main=rank == 0, device=torch.device("cpu"), precision="fp32")
    bundle = distribution.build(None, stand_in, sharded=True)
    return places, next(bundle.model.parameters()).device.type


def test_only_rank_0_builds_the_model_whole(monkeypatch):
    assert built_by(monkeypatch, 0, None) == (["cpu"], "cpu")
    assert built_by(monkeypatch, 1, None) == (["meta"], "meta")


def test_a_model_that_cannot_be_laid_out_is_built_whole(monkeypatch, caplog):
    assert built_by(monkeypatch, 1, "another layout") == (["meta", "cpu"], "cpu")
    assert "each rank builds it whole" in caplog.text
    assert built_by(monkeypatch, 0, "another layout") == (["cpu"], "cpu")


def test_layers_that_no_class_names_are_refused():
    bundle = SimpleNamespace(model=torch.nn.Sequential(torch.nn.Linear(2, 2)), report={})
    settings = SimpleNamespace(distributed=SimpleNamespace(param_dtype="fp32", cpu_offload=False))
    with pytest.raises(EngineError, match=r"E4\.21.*Sequential does not say"):
        distribution.shard(bundle, settings, runtime(2))


def test_layers_dropped_now_and_then_are_refused(monkeypatch):
    monkeypatch.setattr(distribution.sharding, "is_sharded", lambda model: True)
    model = tiny.model("bart")
    assert distribution.wrap(model, runtime(2), irregular=False) is model
    with pytest.raises(EngineError, match=r"E2\.73.*drops layers"):
        distribution.wrap(model, runtime(2), irregular=True)
