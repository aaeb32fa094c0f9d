"""What leaves for the hub: the model's own files, whole, and nothing that a run keeps beside them."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import push_to_hub
import pytest

from engine.errors import EngineError


@pytest.fixture
def model(trained, tmp_path):
    """A copy of final_model, to spoil."""
    return shutil.copytree(trained[0] / "run" / "final_model", tmp_path / "model")


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def test_a_folder_in_place_of_the_hub_gets_a_model_that_loads_alone(trained, tmp_path, capsys):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    final = trained[0] / "run" / "final_model"
    out = tmp_path / "hub"
    assert push_to_hub.main([str(trained[0] / "run"), "--to-folder", str(out)]) == 0
    went = {path.name for path in out.iterdir()}
    assert went == {path.name for path in final.iterdir()} >= {"model.safetensors", "README.md", "recipe.yaml"}
    assert all((out / name).read_bytes() == (final / name).read_bytes() for name in went)
    assert all(name in capsys.readouterr().out for name in ["README.md"])
    AutoModelForSeq2SeqLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)
    with pytest.raises(EngineError, match="E2.63"):
        push_to_hub.main([str(final), "--to-folder", str(out)])


def test_states_data_and_predictions_stay(trained, model, tmp_path, capsys):
    run = trained[0] / "run"
    (checkpoint,) = [path for path in run.glob("checkpoint-*") if (path / "engine_state").is_dir()][:1]
    shutil.copytree(checkpoint / "engine_state", model / "engine_state")
    shutil.copytree(run / "predictions", model / "predictions")
    for name in ("train.csv", ".env", "rows.jsonl", "train.log"):
        (model / name).write_text("대화")
    before = {path.name for path in (run / "final_model").iterdir()}
    assert push_to_hub.main([str(model), "--to-folder", str(tmp_path / "hub")]) == 0
    assert {path.name for path in (tmp_path / "hub").rglob("*")} == before
    assert "stays here: .env, engine_state, predictions, rows.jsonl, train.csv, train.log" in capsys.readouterr().out


def test_one_commit_takes_the_files(model, monkeypatch, online, capsys):
    calls = []

    class Api:
        def create_repo(self, name, **settings):
            calls.append((name, settings))

        def repo_info(self, name):
            return SimpleNamespace(private=True)

        def create_commit(self, name, operations, **settings):
            calls.append((name, sorted(operation.path_in_repo for operation in operations)))
            return SimpleNamespace(commit_url="https://example.com/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    (model / "notes.csv").write_text("x")
    assert push_to_hub.main([str(model), "--repo", "me/model", "--private", "--dry-run"]) == 0
    assert calls == [] and "nothing was uploaded" in capsys.readouterr().out
    assert push_to_hub.main([str(model), "--repo", "me/model", "--private"]) == 0
    assert calls[0] == ("me/model", {"private": True, "exist_ok": True})
    assert calls[1] == ("me/model", sorted(path.name for path in model.iterdir() if path.name != "notes.csv"))
    assert capsys.readouterr().out.endswith("https://example.com/commit/1\n")


@pytest.mark.parametrize("there_is", ["private", "public"])
def test_private_means_private_also_where_the_repository_is_there(model, monkeypatch, online, there_is):
    """create_repo leaves one that is there as it is."""
    made = []

    class Api:
        create_repo = staticmethod(lambda name, **settings: None)
        repo_info = staticmethod(lambda name: SimpleNamespace(private=there_is == "private"))
        create_commit = staticmethod(lambda *given, **settings: made.append(given) or SimpleNamespace(commit_url="x"))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    command = [str(model), "--repo", "me/model"]
    if there_is == "private":
        assert push_to_hub.main([*command, "--private"]) == 0 and len(made) == 1
        return
    with pytest.raises(EngineError, match=r"E2\.137.*me/model.*nothing was uploaded"):
        push_to_hub.main([*command, "--private"])
    assert made == [] and push_to_hub.main(command) == 0 and len(made) == 1


@pytest.mark.parametrize("status", [None, 401])
def test_a_failure_is_one_line_with_its_code(model, monkeypatch, online, status):
    def fail(*args, **settings):
        error = OSError("could not connect with hf_abcdefghijklmnop\nand much more")
        error.response = SimpleNamespace(status_code=status)
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(EngineError) as caught:
        push_to_hub.main([str(model), "--repo", "me/model"])
    text = str(caught.value)
    assert caught.value.exit_code == 6 and "\n" not in text and "hf_abc" not in text
    assert ("hf auth login" in text) == (status == 401)


def test_offline_is_said_before_anything_is_tried(model, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", None)
    with pytest.raises(EngineError, match="E2.134.*HF_HUB_OFFLINE"):
        push_to_hub.main([str(model), "--repo", "me/model"])


def add_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


SPOILT = {
    "E4.3": lambda model: (model / "pytorch_model.bin").write_bytes(b"x"),
    "E4.4": lambda model: (model / "extra.json").symlink_to(model / "config.json"),
    "E2.133 key": lambda model: add_json(model / "config.json", hf_token="secret words"),
    "E2.133 value": lambda model: add_json(model / "prompt_settings.json", note="see https://me:pass@example.com"),
    "E2.133 card": lambda model: (model / "README.md").write_text("token hf_abcdefghijklmnop"),
    "E2.133 recipe": lambda model: (model / "recipe.yaml").write_text("model:\n  config:\n    api_key: abc\n"),
    "E4.2": lambda model: add_json(model / "config.json", auto_map={"AutoModel": "code.Model"}),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_must_not_leave_is_refused(name, model, tmp_path):
    SPOILT[name](model)
    with pytest.raises(EngineError) as caught:
        push_to_hub.main([str(model), "--to-folder", str(tmp_path / "hub")])
    assert caught.value.code == name.split()[0] and "hf_abc" not in str(caught.value)
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("name", ["model", "a/b/c", "../x", "me/", "https://huggingface.co/me/x"])
def test_a_name_that_no_repository_has(name, model):
    with pytest.raises(EngineError, match="E2.135"):
        push_to_hub.main([str(model), "--repo", name])
