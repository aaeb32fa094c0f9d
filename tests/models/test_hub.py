"""Foreign folders are refused before anything of them is loaded or run, and a model is known by its hashes."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time

import own_code
import pytest
import tiny
from built import CPU, build, refused
from generation_toys import one_thread  # noqa: F401

from engine.errors import EngineError
from engine.models import hub
from engine.models.bundle import save_model
from engine.models.load import load_trained
from engine.runtime import atomic


def test_damaged_weights_and_configs_are_one_line(tmp_path):
    folder = tiny.save("bart", tmp_path)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-100], b"", b"\xff" * 64):
        path.write_bytes(damaged)
        refused("E4.8", folder)
    path.write_bytes(content)
    for text in ("", "[]", "{", '{"model_type": 3}', "[" * 100_000):
        (folder / "config.json").write_text(text, encoding="utf-8")
        refused("E4.9", folder)


class Canary:
    """Its unpickling leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_pickle_weights_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    folder = tiny.save("bart", tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "sprung")))
    assert "pytorch_model.bin" in refused("E4.3", folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_code_shipped_with_a_model_is_refused(tmp_path, name):
    folder = tiny.save("llama", tmp_path / "m")
    path = folder / name
    values = json.loads(path.read_text(encoding="utf-8"))
    canary = f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\nclass M: pass\n"
    (folder / "modeling_evil.py").write_text(canary, encoding="utf-8")
    for evil in (
        {"auto_map": {"AutoModelForCausalLM": "modeling_evil.M"}},
        {"deep": {"auto_map": {"AutoConfig": "x.M"}}},
    ):
        path.write_text(json.dumps(values | evil), encoding="utf-8")
        refused("E4.2", folder)
    assert not (tmp_path / "sprung").exists()


def test_code_shipped_with_a_model_runs_with_the_flag_and_a_pinned_commit(tmp_path, monkeypatch):
    folder = own_code.save(tmp_path / "m", tmp_path / "ran", monkeypatch)
    refused("E4.2", folder)
    refused("E2.54", folder, model={"trust_remote_code": True})
    assert not (tmp_path / "ran").exists()
    for init in ("pretrained", "random"):
        bundle = build(folder, model={"trust_remote_code": True, "revision": own_code.PINNED, "init": init})
        assert type(bundle.model).__name__ == "Own" and (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "model.bin", "nowhere.safetensors", 3]
)
def test_shard_indexes_may_only_name_files_of_the_folder(tmp_path, shard):
    folder = tiny.save("bart", tmp_path / "m")
    tiny.save("bart", tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    refused("E4.4", folder)


def test_links_that_leave_the_folder_are_refused(tmp_path):
    folder = tiny.save("bart", tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    refused("E4.4", folder)


def test_links_of_a_hub_cache_are_followed(tmp_path):
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    folder = tiny.save("bart", tmp_path / "models--a--b" / "snapshots" / ("0" * 40))
    (folder / "model.safetensors").rename(blobs / "abc")
    (folder / "model.safetensors").symlink_to(blobs / "abc")
    assert build(folder).base.revision == "0" * 40


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"},
        {"task_type": "FEATURE_EXTRACTION"},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}},
        {"corda_config": {"cache_file": "evil.pt"}},
        {"eva_config": {"x": 1}},
        {"target_modules": {"a": 1}},
    ],
)
def test_adapters_other_than_plain_lora_are_refused(tmp_path, change):
    bundle = build(tiny.save("llama", tmp_path / "base"), lora={"enabled": True})
    save_model(bundle, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(EngineError, match=r"E4\.5"):
        load_trained(tmp_path / "adapter", device=CPU)


@pytest.mark.slow
def test_unreachable_hub_is_one_quick_error(root):
    """Without the offline switch and with names that do not resolve: the client must not retry for minutes."""
    code = (
        "import torch\nfrom engine.models import build\nfrom engine.recipe.schema import Recipe\n"
        "from engine.errors import EngineError\n"
        "recipe = Recipe(model={'name_or_path': 'nobody/nothing'})\n"
        "try:\n    build.build_model(recipe, device=torch.device('cpu'), precision='fp32')\n"
        "except EngineError as error:\n    print(error)\n"
    )
    quiet = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(root)}  # port 9: nobody answers
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], env=quiet | closed, capture_output=True, text=True, timeout=120, check=False
    )
    assert time.perf_counter() - started < 60  # most of it is importing, beside another test
    assert done.stdout.startswith("error E4.1:") and "hf download" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["../nowhere/at all", "/no/such/folder", "a/b/c", "no such"])
def test_names_that_are_no_hub_ids_never_reach_the_hub(name):
    with pytest.raises(EngineError, match=r"E4\.1.*not a hub id"):
        hub.resolve(name)


def test_identity_tells_two_trainings_of_one_shape_apart(tmp_path):
    first = hub.identify(hub.Source("x", None, tiny.save("llama", tmp_path / "a")))
    again = hub.identify(hub.Source("x", None, tiny.save("llama", tmp_path / "b")))
    other = hub.identify(hub.Source("x", None, tiny.save("llama", tmp_path / "c", seed=1)))
    assert first == again
    assert first.config_sha256 == other.config_sha256 and first.weights_sha256 != other.weights_sha256


def test_a_models_files_may_hold_infinity_and_ours_may_not(tmp_path, monkeypatch):
    """Mamba's configurations do (`time_step_limit`); both readers take objects of limited size only."""
    path = tmp_path / "config.json"
    path.write_text('{"time_step_limit": [0.0, Infinity]}', encoding="utf-8")
    assert hub.read_json(path) == {"time_step_limit": [0.0, float("inf")]}
    with pytest.raises(ValueError, match="Infinity is not JSON"):
        atomic.read_json(path)
    for text, what in (("[1]", "not a JSON object"), ('{"a": "longer"}', "larger than")):
        path.write_text(text, encoding="utf-8")
        monkeypatch.setattr(atomic, "_MAX_JSON_BYTES", 8)
        with pytest.raises(ValueError, match=what):
            atomic.read_json(path)
        with pytest.raises(EngineError, match=rf"E4\.9.*{what}"):
            hub.read_json(path)
