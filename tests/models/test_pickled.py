"""A model with pickled weights trains as one with safetensors does, and nothing in its files runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import runs
import tiny
import torch
from built import CPU, build, refused
from generation_toys import one_thread  # noqa: F401
from safetensors import safe_open
from safetensors.torch import load_file

from engine import Predictor
from engine.models import hub, pickled
from engine.models.load import load_trained

pytestmark = pytest.mark.slow

KOBART = runs.ROOT / "recipes" / "kobart.yaml"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where copies go: never into the cache of the person who runs the tests."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    return tmp_path / "hf" / "ko-dialogue-engine"


def only_bin(folder, shards=1, *, legacy=False, family="bart"):
    """A model folder as old repositories have it: tied weights under each of their names, in one file or in several."""
    tiny.save(family, folder)
    (folder / "model.safetensors").unlink()
    state = tiny.model(family, len(tiny.tokenizer(family))).state_dict()
    names = list(state)
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        return folder
    placed = {}
    for number in range(shards):
        file, own = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin", names[number::shards]
        torch.save({name: state[name] for name in own}, folder / file)
        placed |= dict.fromkeys(own, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def overrides_for(folder, model):
    data = {"train": 16, "validation": 4, "test": 4}
    files = [f"data.{name}_file={tiny.write_rows(folder / f'{name}.jsonl', rows)}" for name, rows in data.items()]
    return [
        *files,
        f"model.name_or_path={model}",
        f"experiment.output_dir={folder / 'run'}",
        f"experiment.output_root={folder}",
        "data.allow_overlap=true",
        "data.max_source_length=96",
        "data.max_target_length=24",
        "training.num_train_epochs=2",
        "training.per_device_train_batch_size=8",
        "training.precision=fp32",
        "evaluation.rouge_tokenizer=whitespace",
        "generation.num_beams=2",
        "generation.max_new_tokens=6",
        "generation.min_new_tokens=1",
        "tracking.report_to=[]",
        "tracking.progress=false",
    ]


@pytest.mark.parametrize("shards", [1, 3])
def test_the_kobart_recipe_trains_predicts_and_resumes(tmp_path, cache, shards):
    model = only_bin(tmp_path / "model", shards)
    overrides = overrides_for(tmp_path, model)
    results = runs.train(KOBART, *overrides)
    said = [line for line in (tmp_path / "run" / "train.log").read_text().splitlines() if "restricted reader" in line]
    assert len(said) == 1 and str(cache) in said[0]
    assert len(list(cache.iterdir())) == 1, "one copy, and no leftovers"
    assert results["last_step"] == 4
    texts = Predictor.from_run(tmp_path / "run").predict_batch(tiny.TEXTS[:3], show_progress=False)
    assert len(texts) == 3
    before = runs.rows_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final_model")
    (tmp_path / "run" / "run_status.json").unlink()
    first = min((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(cache)  # made again, the copy has the same identity
    runs.train(KOBART, *overrides, resume=str(first))
    after = runs.rows_of(tmp_path / "run")
    assert [row["loss"] for row in after] == [row["loss"] for row in before]
    again = Predictor.from_run(tmp_path / "run").predict_batch(tiny.TEXTS[:3], show_progress=False)
    assert again == texts


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_weights_are_those_of_the_file(tmp_path, family):
    made = build(only_bin(tmp_path / "old", family=family)).model.state_dict()
    wanted = build(tiny.save(family, tmp_path / "new")).model.state_dict()
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    assert len(list((tmp_path / "old").iterdir())) == len(list((tmp_path / "new").iterdir())), (
        "the folder is left alone"
    )


def test_types_and_tied_weights_stay(tmp_path):
    folder = only_bin(tmp_path / "old")
    state = {name: value.bfloat16() for name, value in torch.load(folder / "pytorch_model.bin").items()}
    state["lm_head.weight"] = state["model.shared.weight"]
    state["turned"] = torch.arange(6, dtype=torch.float16).reshape(2, 3).T
    torch.save(state, folder / "pytorch_model.bin")
    copy = hub.resolve(str(folder))
    stored = load_file(copy / "model.safetensors")
    assert stored.keys() == state.keys()
    for name, value in state.items():
        assert stored[name].dtype == value.dtype and torch.equal(stored[name], value)
    assert hub.resolve(str(folder)) == copy, "the second time it is there"
    model = load_trained(folder, device=CPU, precision="fp32").model
    assert model.lm_head.weight is model.model.shared.weight


def test_files_from_before_torch_1_6_are_read(tmp_path):
    folder = only_bin(tmp_path / "old", legacy=True)
    with safe_open(hub.resolve(str(folder)) / "model.safetensors", framework="pt") as file:
        assert "model.shared.weight" in file.keys()


def test_other_weights_or_another_tokenizer_make_another_copy(tmp_path, cache):
    folder = only_bin(tmp_path / "old")
    copies = {hub.resolve(str(folder))}
    state = {name: value + 1 for name, value in torch.load(folder / "pytorch_model.bin").items()}
    torch.save(state, folder / "pytorch_model.bin")
    copies.add(hub.resolve(str(folder)))
    (folder / "generation_config.json").write_text('{"num_beams": 3}', encoding="utf-8")
    copies.add(hub.resolve(str(folder)))
    assert len(copies) == 3 == len(list(cache.iterdir()))
    assert json.loads((hub.resolve(str(folder)) / "generation_config.json").read_text()) == {"num_beams": 3}


class Canary:
    """Its unpickling leaves a folder behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_nothing_in_a_hostile_file_runs(tmp_path, cache):
    folder, sprung = only_bin(tmp_path / "old"), tmp_path / "sprung"
    path = folder / "pytorch_model.bin"
    state = dict(torch.load(path))
    wide = torch.zeros(1).expand(10**6)
    for content in (
        Canary(sprung),
        state | {"extra": Canary(sprung)},
        state | {"extra": "text"},
        state | {"extra": {"a": torch.zeros(2)}},
        state | {3: torch.zeros(2)},
        state | {"wide": wide},
        state | {"sparse": torch.eye(3).to_sparse()},
        list(state.values()),
        {},
    ):
        torch.save(content, path)
        assert "the weights cannot be read safely" in refused("E4.3", folder)
    for raw in (pickle.dumps(Canary(sprung)), b"", b"PK\x03\x04", pickle.dumps({"a": 1})):
        path.write_bytes(raw)
        refused("E4.3", folder)
    assert not sprung.exists() and not list(cache.iterdir())


@pytest.mark.parametrize("shard", ["../outside.bin", "/etc/passwd", "sub/x.bin", "nowhere.bin", "optimizer.bin", 3])
def test_an_index_may_only_name_files_beside_it(tmp_path, shard):
    folder = only_bin(tmp_path / "old", shards=2)
    (folder / "optimizer.bin").write_bytes(b"")
    (tmp_path / "outside.bin").write_bytes(b"")
    index = {"weight_map": {"lm_head.weight": shard}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    refused("E4.4", folder)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = only_bin(tmp_path / "old")
    (folder / "pytorch_model.bin").rename(tmp_path / "outside.bin")
    (folder / "pytorch_model.bin").symlink_to(tmp_path / "outside.bin")
    refused("E4.4", folder)


def test_the_recipe_and_the_environment_can_refuse(tmp_path, cache, monkeypatch):
    folder = only_bin(tmp_path / "old")
    assert "use_safetensors" in refused("E4.3", folder, model={"use_safetensors": True})
    assert not cache.exists()
    monkeypatch.setenv(pickled.UNSAFE, "1")
    refused("E2.40", folder)


def test_pickled_adapters_are_refused(tmp_path):
    folder = tiny.save("llama", tmp_path / "adapter")
    (folder / "model.safetensors").rename(folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    refused("E4.3", folder, lora={"enabled": True})


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_hub_is_asked_for_pickles_only_where_there_is_nothing_else(tmp_path, monkeypatch, kind):
    commit = "c" * 40
    source = tiny.save("bart", tmp_path / "s") if kind == "safetensors" else only_bin(tmp_path / "s")
    snapshot = tmp_path / "models--a--b" / "snapshots" / commit
    asked = []

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns, etag_timeout):
        asked.append((revision, allow_patterns))
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy2(file, snapshot / file.name)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    bundle = build(None, model={"name_or_path": "a/b"})
    assert bundle.base.revision == commit and bundle.base.name == "a/b"
    assert [revision for revision, _ in asked] == [None, commit][: 1 if kind == "safetensors" else 2]
    assert not any(pattern.endswith(".bin") for pattern in asked[0][1])
    asked.clear()
    if kind == "bin":
        shutil.rmtree(snapshot)
        refused("E4.3", None, model={"name_or_path": "a/b", "use_safetensors": True})
        assert len(asked) == 1
