"""Nested state comes back bit for bit, and what was tampered with is refused."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from checkpoint_toys import open_store, rewrite_manifest, save, toy

from engine.checkpoints import state_files
from engine.checkpoints import store as checkpoints_store
from engine.errors import EngineError


def test_nested_state_comes_back_exactly(tmp_path):
    import numpy

    shared = torch.arange(6, dtype=torch.uint8)
    value = {
        0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 2).t()},
        "betas": (0.9, 0.1 + 0.2),
        "floats": [5e-324, -0.0, 1.7976931348623157e308, math.inf, -math.inf, math.nan],
        "nothing": None,
        "flags": [True, 1],
        "bf16": torch.randn(4).bfloat16(),
        "empty": torch.zeros(0, 3),
        "twice": [shared, shared],
        "numpy": numpy.random.RandomState(1).get_state(),
        "한국어": "요약",
    }
    flat, tensors = state_files.flatten_state(value)
    state_files.write_state(tmp_path, "state", flat, tensors)
    back = state_files.read_state(tmp_path, "state")
    assert list(back) == list(value)
    assert back["betas"] == value["betas"] and isinstance(back["betas"], tuple)
    assert [repr(x) for x in back["floats"]] == [repr(x) for x in value["floats"]]
    assert back["flags"] == [True, 1] and back["flags"][0] is True and back["nothing"] is None
    assert torch.equal(back[0]["exp_avg"], value[0]["exp_avg"]) and back[0]["step"].shape == ()
    assert back["bf16"].dtype == torch.bfloat16 and torch.equal(back["bf16"], value["bf16"])
    assert back["empty"].shape == (0, 3)
    assert back["twice"][0] is back["twice"][1], "one tensor is stored once"
    assert back["numpy"][1].dtype == numpy.uint32 and (back["numpy"][1] == value["numpy"][1]).all()
    numpy.random.RandomState().set_state(back["numpy"])


def test_what_json_and_safetensors_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="cannot store a set"):
        state_files.flatten_state({"x": {1, 2}})


@pytest.mark.parametrize("kind", ["adamw", pytest.param("adamw_8bit", marks=pytest.mark.slow)])
def test_optimizer_goes_on_bit_for_bit(tmp_path, kind):
    if kind == "adamw_8bit":
        bitsandbytes = pytest.importorskip("bitsandbytes")
        factory = bitsandbytes.optim.AdamW8bit
    else:
        factory = torch.optim.AdamW

    def build():
        torch.manual_seed(0)
        model = torch.nn.Linear(128, 64)  # 8,192 weights: enough for the 8-bit state, which starts at 4,096
        return model, factory(model.parameters(), lr=1e-2, weight_decay=0.1)

    def train(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(100 + step)
            optimizer.zero_grad()
            model(torch.randn(4, 128)).square().mean().backward()
            optimizer.step()

    model, optimizer = build()
    train(model, optimizer, range(3))
    state_files.write_state(tmp_path, "optimizer", *state_files.flatten_state(optimizer.state_dict()))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, optimizer, range(3, 6))

    again, resumed = build()
    again.load_state_dict(weights)
    resumed.load_state_dict(state_files.read_state(tmp_path, "optimizer"))
    if kind == "adamw_8bit":
        assert resumed.state[again.weight]["state1"].dtype == torch.uint8
    train(again, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


BAD_STATES = ["[]", '{"dict": 1}', '{"tensor": "none"}', '{"what": 1}', '{"dict": [[[1], 2]]}', "[" * 100000, "1"]


@pytest.mark.parametrize("text", BAD_STATES, ids=range(len(BAD_STATES)))
@pytest.mark.parametrize("name", ["trainer_state", "optimizer"])
def test_a_state_that_fits_its_manifest_but_nothing_else(tmp_path, text, name):
    """Someone who can write files can write hashes too: the contents are not trusted either."""
    save(open_store(tmp_path), 1)
    folder = tmp_path / "checkpoint-1"
    path = folder / "engine_state" / f"{name}.json"
    path.write_text(text)
    entry = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    rewrite_manifest(folder, lambda manifest: manifest["files"].update({f"engine_state/{name}.json": entry}))
    store = open_store(tmp_path)
    found = store.find_resume("auto")
    try:
        with checkpoints_store.refusing(found):
            state = store.load_state(found)
            toy()[1].load_state_dict(state.optimizer)
    except EngineError as error:
        assert error.exit_code == 5
    else:
        pytest.fail("accepted")
