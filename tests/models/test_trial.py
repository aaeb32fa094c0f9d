"""What loading does not see shows in the trial of a folder: in a line of code 4, with the folder's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

from engine.errors import EngineError
from engine.models import trial
from engine.models.build import build_model
from engine.prediction.predictor import Predictor
from engine.recipe.schema import Recipe

LOOP = "{% for i in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "loops": (LOOP, r"E4\.18.*it takes more than 1 s"),
    "computes in C": ("{{ 9 ** (9 ** 9) }}", r"E4\.18.*it takes more than 1 s"),
    "loops over long dialogues": (
        "{% if messages[-1]['content'] | length > 999 %}" + LOOP + "{% endif %}x",
        r"E4\.18.*more than 1 s",
    ),
    "repeats": ("{{ 'a' * 10 ** 10 }}", r"E4\.18.*it takes more than 64 MiB"),
    "doubles": (
        "{% set ns = namespace(x='x') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        r"E4\.18.*more than 64 MiB",
    ),
    "nests": (
        "{% set ns = namespace(x='x') %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        r"E4\.18.*takes more than",
    ),
    "writes 5 MB": ("{{ 'x' * 5000000 }}", r"E4\.18.*5,000,000 characters"),
    "is no template": ("{% for %}", r"E4\.18.*TemplateSyntaxError"),
    "writes half characters": ("{{ '\\ud800' }}", r"E4\.16"),
    "writes nothing": ("{% if false %}x{% endif %}", r"E4\.16.*no token"),
    "has a message": ("{{ raise_exception('no, thank you') }}", r"E2\.71.*no, thank you"),
}

SLOW = ("loops over long dialogues", "doubles", "nests")


def build(folder: Path, **sections):
    recipe = Recipe(model={"name_or_path": str(folder)}, **sections)
    return build_model(recipe, device=torch.device("cpu"), precision="fp32")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in TEMPLATES])
def test_a_bad_template_is_told_when_the_model_is_loaded(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trial, "_APPETITE", {"seconds": 1, "mebibytes": 64})
    template, match = TEMPLATES[name]
    folder = tiny.save("llama", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(EngineError, match=match) as caught:
        build(folder, prompt={"style": "chat"})
    assert len(str(caught.value)) < 500 and (str(folder) in str(caught.value) or caught.value.exit_code == 2)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("generation_config.json", {"sequence_bias": "x"}),
        ("generation_config.json", {"prompt_lookup_num_tokens": 3}),
        ("generation_config.json", {"min_length": "x"}),
        ("tokenizer_config.json", {"model_max_length": "x"}),
        ("config.json", {"dropout": -1}),
        ("config.json", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
    ],
)
def test_a_value_that_breaks_after_loading_is_told_as_the_folders(file: str, change: dict, tmp_path: Path) -> None:
    folder = tiny.save("bart", tmp_path / "model")
    values = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps(values | change), encoding="utf-8")
    for use in (
        lambda: Predictor.from_run(folder, device="cpu").predict_single("#Person1#: 안녕"),
        lambda: build(folder),
    ):
        try:
            use()
        except EngineError as error:
            assert error.exit_code == 4 and len(str(error)) < 500, error


def test_a_trial_leaves_the_model_and_the_random_stream_as_they_were(tmp_path: Path) -> None:
    folder = tiny.save("bart", tmp_path / "model")
    stored = tiny.model("bart", len(tiny.tokenizer("bart"))).state_dict()
    before = torch.get_rng_state()
    bundle = build(folder, tokenizer={"added_tokens": []})
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(stored[name], tensor) for name, tensor in bundle.model.state_dict().items())
    assert all(parameter.grad is None for parameter in bundle.model.parameters())


def test_a_setting_out_of_its_range_can_be_replaced_by_the_users_own(tmp_path: Path) -> None:
    folder = tiny.save("bart", tmp_path / "model")
    values = {"min_length": -1, "decoder_start_token_id": 3}
    (folder / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    predictor = Predictor.from_run(folder, device="cpu")
    with pytest.raises(EngineError, match=r"E4\.17.*min_length=-1.*generation_config\.json"):
        predictor.predict_single("#Person1#: 안녕")
    predictor.predict_single("#Person1#: 안녕", min_length=1, max_new_tokens=2)
    predictor.bundle.generation_config.min_length = None
    with pytest.raises(EngineError, match=r"E2\.36.*the model has no token 1000000"):
        predictor.predict_single("#Person1#: 안녕", forced_bos_token_id=10**6)
