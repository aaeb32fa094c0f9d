"""Models and tokenizers: built, saved, reloaded, restored; foreign folders refused before anything of them is loaded."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time

import pytest
import tiny
import torch
from generation_toys import one_thread  # noqa: F401

from engine.errors import EngineError
from engine.models import build as models_build
from engine.models import hub, tokenization, weights
from engine.recipe.schema import PLACEHOLDERS, Recipe

CPU = torch.device("cpu")
SPOKEN = "#Person1#는 #Person2#에게 #PhoneNumber#를 알려 준다."


def recipe(folder=None, *, model=None, **sections):
    named = {} if folder is None else {"name_or_path": str(folder)}
    return Recipe(model=named | (model or {}), **sections)


def build(*args, precision="fp32", **sections):
    return models_build.build_model(recipe(*args, **sections), device=CPU, precision=precision)


def logits(model, family):
    ids = torch.tensor([[5, 6, 7, 300, 301, 9]])
    extra = {"decoder_input_ids": ids} if family in ("bart", "t5", "seq2seq") else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **extra).logits


def refused(code, *args, **sections):
    with pytest.raises(EngineError) as caught:
        build(*args, **sections)
    assert caught.value.code == code, str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Building and saving


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_build_save_reload_and_restore_to_the_bit(tmp_path, family):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    bundle = build(tiny.save(family, tmp_path / "base"))
    saved = tmp_path / "saved"
    models_build.save_model(bundle, saved)
    assert not [path for path in saved.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]

    again = models_build.load_trained(saved, device=CPU)
    assert torch.equal(logits(bundle.model, family), logits(again.model, family))
    assert again.prompt == bundle.prompt and again.lengths == bundle.lengths
    assert again.family == bundle.family == ("causal" if family in tiny.CAUSAL else "seq2seq")

    auto = AutoModelForCausalLM if family in tiny.CAUSAL else AutoModelForSeq2SeqLM
    alone = auto.from_pretrained(saved)
    assert torch.equal(logits(bundle.model, family), logits(alone, family))
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer(SPOKEN)["input_ids"] == bundle.tokenizer(SPOKEN)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(SPOKEN), skip_special_tokens=True) == SPOKEN

    other = build(tmp_path / "base", training={"seed": 7})
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(1.0)
    weights.load_weights(other.model, saved)
    for name, tensor in bundle.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name


def test_a_snapshot_is_saved_in_place_of_the_live_weights(tmp_path):
    bundle = build(tiny.save("bart", tmp_path / "base"))
    frozen = {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}
    before = logits(bundle.model, "bart")
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            parameter.mul_(2)
    models_build.save_model(bundle, tmp_path / "saved", state_dict=frozen)
    assert torch.equal(before, logits(models_build.load_trained(tmp_path / "saved", device=CPU).model, "bart"))


def test_wrapped_models_are_saved_bare(tmp_path):
    bundle = build(tiny.save("t5", tmp_path / "base"))
    bare = bundle.model

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    bundle.model = Wrapper(bare)
    assert weights.unwrap(bundle.model) is bare
    models_build.save_weights(bundle, tmp_path / "saved")
    weights.load_weights(bundle.model, tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_restoring_refuses_other_shapes_and_changes_nothing(tmp_path):
    models_build.save_model(build(tiny.save("llama", tmp_path / "a")), tmp_path / "saved")
    other = build(tiny.save("llama", tmp_path / "b", intermediate_size=96))
    before = logits(other.model, "llama")
    with pytest.raises(EngineError, match=r"E5\.10"):
        weights.load_weights(other.model, tmp_path / "saved")
    assert torch.equal(before, logits(other.model, "llama"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_random_models_train_their_own_tokenizer(tmp_path, family, kind):
    rows = tiny.write_rows(tmp_path / "train.jsonl")
    values = tiny.config_values(family)
    for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        values.pop(key, None)
    sections = {
        "data": {"train_file": str(rows)},
        "tokenizer": {"train_vocab_size": 420, "train_model_type": kind},
    }
    first, second = (build(model={"init": "random", "config": dict(values)}, **sections) for _ in range(2))
    assert torch.equal(logits(first.model, family), logits(second.model, family))
    assert tokenization.fingerprint(first.tokenizer) == tokenization.fingerprint(second.tokenizer)
    tokenizer, config = first.tokenizer, first.model.config
    assert config.vocab_size == len(tokenizer) <= 420
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    if first.family == "seq2seq":
        start = tokenizer.pad_token_id if family == "t5" else tokenizer.eos_token_id
        assert first.model.generation_config.decoder_start_token_id == config.decoder_start_token_id == start
        assert getattr(config, "forced_eos_token_id", None) is None
        assert tokenizer("가").input_ids[-1] == tokenizer.eos_token_id
    else:
        assert tokenizer("가").input_ids[0] == tokenizer.bos_token_id
    models_build.save_model(first, tmp_path / "saved")
    assert torch.equal(
        logits(first.model, family), logits(models_build.load_trained(tmp_path / "saved", device=CPU).model, family)
    )


def test_a_seed_decides_random_weights_and_leaves_the_callers_stream(tmp_path):
    model = {"init": "random", "name_or_path": str(tiny.save("bart", tmp_path))}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build(model=model, training={"seed": 1})
    assert torch.equal(torch.rand(3), expected)
    second, third = build(model=model, training={"seed": 1}), build(model=model, training={"seed": 2})
    assert torch.equal(logits(first.model, "bart"), logits(second.model, "bart"))
    assert not torch.equal(logits(first.model, "bart"), logits(third.model, "bart"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_new_rows_start_at_the_mean_of_their_old_spelling(tmp_path, family):
    folder = tiny.save(family, tmp_path)
    old = tokenization.load_tokenizer(folder)
    base = tiny.model(family, len(old))
    bundle = build(folder, tokenizer={"added_tokens": ["#Person1#", "#Address#", "하하"], "pad_to_multiple_of": 16})
    rows = bundle.model.get_input_embeddings().weight
    assert rows.shape[0] % 16 == 0 and bundle.report["vocabulary"] == len(old) + 2
    assert torch.equal(rows[: len(old)], base.get_input_embeddings().weight)
    for token in ("#Address#", "하하"):
        spelled = old.encode(token, add_special_tokens=False)
        for ours, theirs in (
            (rows, base.get_input_embeddings().weight),
            (bundle.model.get_output_embeddings().weight, base.get_output_embeddings().weight),
        ):
            expected = theirs[spelled].mean(0)
            torch.testing.assert_close(ours[bundle.tokenizer.convert_tokens_to_ids(token)], expected)


def test_an_untied_t5_keeps_its_own_output_head(tmp_path):
    """T5 1.1 (pko-T5 too): transformers' configuration calls it tied and a resize would copy the embedding over the head."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForSeq2SeqLM

    folder = tiny.save("t5", tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    head = torch.randn_like(tensors["shared.weight"])
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    bundle = build(folder)
    rows = bundle.report["vocabulary_before"]
    assert bundle.report["embedding_rows"] > rows
    assert torch.equal(bundle.model.get_output_embeddings().weight[:rows], head)
    assert torch.equal(bundle.model.get_input_embeddings().weight[:rows], tensors["shared.weight"])
    models_build.save_model(bundle, tmp_path / "saved")
    expected = logits(bundle.model, "t5")
    assert torch.equal(logits(models_build.load_trained(tmp_path / "saved", device=CPU).model, "t5"), expected)
    assert torch.equal(logits(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved"), "t5"), expected)


def test_dropout_of_the_recipe_replaces_the_models(tmp_path):
    config = build(tiny.save("bart", tmp_path), model={"dropout": 0.25}).model.config
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.25, 0.25, 0.25)
    assert config.classifier_dropout != 0.25


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    folder = tiny.save("qwen3", tmp_path)
    gradients = []
    for checkpointing in (False, True):
        bundle = build(folder, training={"gradient_checkpointing": checkpointing})
        ids = torch.tensor([[5, 6, 7, 8]])
        bundle.model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(bundle.model.get_input_embeddings().weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trained_weights_are_float32_under_every_precision(tmp_path, precision):
    bundle = build(tiny.save("bart", tmp_path), precision=precision)
    assert {p.dtype for p in bundle.model.parameters()} == {torch.float32}
    assert bundle.report["precision"] == precision


# Real tokenizers


def test_kobart_keeps_its_quirks_and_the_spacing_of_placeholders(tmp_path, shared_data):
    small = {
        "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    }  # fmt: skip
    bundle = build(shared_data / "tokenizers" / "kobart", model={"init": "random", "config": small})
    assert (bundle.report["vocabulary_before"], bundle.report["vocabulary"]) == (30000, 30016)
    assert bundle.model.config.decoder_start_token_id == 2
    models_build.save_model(bundle, tmp_path)
    for made in (bundle, models_build.load_trained(tmp_path, device=CPU)):
        generation = made.model.generation_config
        assert (generation.eos_token_id, generation.forced_eos_token_id) == ([1], 2)
        assert (generation.decoder_start_token_id, generation.pad_token_id) == (2, 3)
        assert made.tokenizer.decode(made.tokenizer.encode(SPOKEN), skip_special_tokens=True) == SPOKEN
        assert made.tokenizer.all_special_tokens == ["<s>", "</s>", "<unk>", "<pad>", "<mask>"]


def test_placeholders_of_real_summaries_survive_real_tokenizers(shared_data):
    import csv

    with (shared_data / "dialogsum_ko" / "train.csv").open(encoding="utf-8-sig", newline="") as file:
        summaries = [row["summary"] for row in csv.DictReader(file)]
    for name, model_type in (("kobart", "bart"), ("qwen3", "qwen3")):
        tokenizer = tokenization.load_tokenizer(shared_data / "tokenizers" / name)
        tokenizer = tokenization.prepare(tokenizer, PLACEHOLDERS, name=name, model_type=model_type)
        for text in summaries:
            ids = tokenizer.encode(text, add_special_tokens=False)
            back = tokenizer.decode(ids, skip_special_tokens=True)
            for tag in ("#Person1#", "#Person2#"):
                assert [part[:2] for part in back.split(tag)[1:]] == [part[:2] for part in text.split(tag)[1:]]
            if tokenizer.unk_token_id not in ids and name == "qwen3":
                assert back == text


# Tokenizers


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_trained_tokenizer_gives_every_text_back(kind):
    tokenizer = tokenization.train_tokenizer(
        tiny.TEXTS, vocabulary_size=420, kind=kind, added_tokens=PLACEHOLDERS, causal=False
    )
    for text in [*tiny.TEXTS, SPOKEN, "뷁쉙 😀 café\n\nend", "a  b   c", "#Person1# #Person2#"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_trained_tokenizer_cuts_like_sentencepiece(kind, monkeypatch):
    import sentencepiece

    kept = {}
    original = tokenization._fast_tokenizer
    monkeypatch.setattr(
        tokenization, "_fast_tokenizer", lambda model, *rest: kept.update(model=model) or original(model, *rest)
    )
    tokenizer = tokenization.train_tokenizer(tiny.TEXTS, vocabulary_size=420, kind=kind, causal=False)
    reference = sentencepiece.SentencePieceProcessor(model_proto=kept["model"])
    for text in tiny.TEXTS:
        line = text.replace("\n", " ").replace("#", "")
        assert tokenizer.encode(line, add_special_tokens=False) == reference.encode(" " + line)


def test_a_missing_pad_token_is_replaced_and_a_missing_end_is_refused():
    tokenizer = tiny.tokenizer("bart")
    tokenizer.pad_token = None
    tokenization.ensure_end_and_pad(tokenizer, "x")
    assert tokenizer.pad_token == "<unk>"
    tokenizer.unk_token = tokenizer.pad_token = None
    tokenization.ensure_end_and_pad(tokenizer, "x")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(EngineError, match=r"E4\.6"):
        tokenization.ensure_end_and_pad(tokenizer, "x")


def test_t5_style_splitting_keeps_spaces_around_added_tokens():
    from tokenizers import decoders, pre_tokenizers

    tokenizer = tiny.tokenizer("t5")
    backend = tokenizer.backend_tokenizer
    marks = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**marks)]
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(**marks), decoders.Fuse()])
    assert tokenizer.decode(tokenizer.encode(SPOKEN), skip_special_tokens=True) != SPOKEN
    fixed = tokenization.prepare(tokenizer, ["#Person1#", "#Address#"], name="x", model_type="t5")
    assert fixed.decode(fixed.encode(SPOKEN), skip_special_tokens=True) == SPOKEN


def test_a_tokenizer_that_loses_added_tokens_is_refused():
    from tokenizers import decoders

    tokenizer = tiny.tokenizer("bart")
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(EngineError, match=r"E4\.7"):
        tokenization.prepare(tokenizer, ["#Person1#"], name="x", model_type="bart")


# Prompt settings


def test_changed_prompt_settings_are_refused(tmp_path):
    bundle = build(tiny.save("llama", tmp_path / "base"), prompt={"style": "chat"})
    models_build.save_model(bundle, tmp_path / "saved")
    path = tmp_path / "saved" / models_build.PROMPT_FILE
    record = json.loads(path.read_text(encoding="utf-8"))
    assert models_build.load_trained(tmp_path / "saved", device=CPU).prompt.style == "chat"
    for change in ({"instruction": "다른 지시"}, {"style": "plain"}, {"surprise": 1}):
        path.write_text(json.dumps(record | {"prompt": record["prompt"] | change}), encoding="utf-8")
        with pytest.raises(EngineError, match=r"E4\.10"):
            models_build.load_trained(tmp_path / "saved", device=CPU)
    path.write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "saved" / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    with pytest.raises(EngineError, match=r"E4\.10"):
        models_build.load_trained(tmp_path / "saved", device=CPU)


# Refusals


def test_settings_that_do_not_go_together(tmp_path):
    folder = tiny.save("t5", tmp_path / "t5")
    refused("E2.53", folder, precision="fp16")
    refused("E2.48", folder, model={"family": "causal"})
    refused("E2.58")
    refused("E2.49", folder, model={"init": "random"}, quantization={"load_in_4bit": True})
    refused("E2.56", folder, quantization={"load_in_4bit": True}, lora={"enabled": False})
    refused("E2.50", folder, tokenizer={"train_vocab_size": 400})
    refused("E2.51", model={"init": "random", "config": {"model_type": "bart"}})
    refused("E4.9", model={"init": "random", "config": {"model_type": "no_such_type"}})
    refused("E2.54", folder, model={"trust_remote_code": True, "revision": "main"})


def test_missing_weights_are_not_filled_with_noise(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny.save("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "1 weights are missing" in refused("E4.8", folder)


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


def test_pickle_weights_are_refused_unread(tmp_path):
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
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tiny.save("llama", tmp_path / "m")
    code = (
        "import os\nfrom transformers import LlamaForCausalLM\n"
        f"os.makedirs({str(tmp_path / 'ran')!r}, exist_ok=True)\nclass Own(LlamaForCausalLM): pass\n"
    )
    (folder / "modeling_own.py").write_text(code, encoding="utf-8")
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    path.write_text(json.dumps(values), encoding="utf-8")
    refused("E4.2", folder)
    refused("E2.54", folder, model={"trust_remote_code": True})
    assert not (tmp_path / "ran").exists()
    bundle = build(folder, model={"trust_remote_code": True, "revision": "a" * 40})
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
    models_build.save_model(bundle, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(EngineError, match=r"E4\.5"):
        models_build.load_trained(tmp_path / "adapter", device=CPU)


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
    assert time.perf_counter() - started < 30
    assert done.stdout.startswith("error E4.1:") and "hf download" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["../nowhere/at all", "/no/such/folder", "a/b/c", "no such"])
def test_names_that_are_no_hub_ids_never_reach_the_hub(name):
    with pytest.raises(EngineError, match=r"E4\.1.*not a hub id"):
        hub.resolve(name)


def test_identity_tells_two_trainings_of_one_shape_apart(tmp_path):
    first = hub.identify("x", None, tiny.save("llama", tmp_path / "a"))
    again = hub.identify("x", None, tiny.save("llama", tmp_path / "b"))
    other = hub.identify("x", None, tiny.save("llama", tmp_path / "c", seed=1))
    assert first == again
    assert first.config_sha256 == other.config_sha256 and first.weights_sha256 != other.weights_sha256


def test_only_a_single_process_spreads_a_model_that_is_too_large(tmp_path, monkeypatch):
    folder = tiny.save("llama", tmp_path)
    weights_bytes = 4 * sum(hub.stored_types(folder).values())
    gpu = torch.device("cuda", 0)
    assert not weights.too_large(folder, torch.float32, CPU)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for free, expected in ((weights_bytes, True), (2 * weights_bytes, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert weights.too_large(folder, torch.float32, gpu) is expected
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not weights.too_large(folder, torch.float32, gpu)


def test_a_spread_model_gives_the_same_logits(tmp_path, monkeypatch):
    folder = tiny.save("llama", tmp_path / "m")
    monkeypatch.setattr(weights, "too_large", lambda *arguments: True)
    spread = models_build.load_trained(folder, device=CPU, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(spread.model, "llama"), logits(tiny.model("llama", len(spread.tokenizer)), "llama"))


def test_embeddings_never_shrink(tmp_path):
    model = tiny.model("llama", 400)
    weights.resize_embeddings(model, 100, {})
    assert model.get_input_embeddings().weight.shape[0] == 400


@pytest.mark.parametrize("family", ["bart", "t5", "llama"])
def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path, family):
    """Training makes room for added tokens; a folder to predict from has learnt nothing about them."""
    folder = tiny.save(family, tmp_path / "model")
    tokenizer = tiny.tokenizer(family)
    tokenizer.add_tokens(["안녕하세요", "회의는"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(EngineError, match=rf"E4\.15: the tokenizer has {len(tokenizer)} tokens, the model only"):
        models_build.load_trained(folder, device=torch.device("cpu"))
