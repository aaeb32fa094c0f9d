"""States that a checkpoint gives back are held against what they replace, before anything takes them over."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from engine.checkpoints.history import pointed_at
from engine.checkpoints.state_files import check_alike
from engine.errors import EngineError
from engine.training.optim import check_moments
from engine.training.state import TrainerState

OWN = {"lr": 1e-3, "betas": (0.9, 0.999), "foreach": None, "amsgrad": False, "params": [0, 1]}


@pytest.mark.parametrize(
    "change",
    [{"lr": "x"}, {"lr": float("nan")}, {"lr": True}, {"betas": (0.9,)}, {"foreach": "x"}, {"amsgrad": 0}, {"more": 1}],
)
def test_a_value_of_another_kind_is_named(change: dict) -> None:
    check_alike(OWN | {"lr": 2}, OWN, "optimizer")  # a whole number is a number
    with pytest.raises(ValueError, match="optimizer"):
        check_alike(OWN | change, OWN, "optimizer")
    with pytest.raises(ValueError, match="optimizer has other entries"):
        check_alike({key: value for key, value in OWN.items() if key != "lr"}, OWN, "optimizer")


def test_moments_that_the_next_update_would_stumble_over_are_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    check_moments(optimizer, saved)
    for name, value in (("exp_avg", "x"), ("exp_avg", torch.ones(3)), ("exp_avg", 1.0), ("other", torch.ones(2, 3))):
        wrong = copy.deepcopy(saved)
        wrong["state"][0][name] = value
        with pytest.raises(ValueError, match=r"optimizer\.0"):
            check_moments(optimizer, wrong)
    saved["param_groups"][0]["params"] = [7]
    with pytest.raises(ValueError, match="other parameters"):
        check_moments(optimizer, saved)


def test_counters_of_another_kind_are_refused() -> None:
    state = TrainerState(step=3, best_step=2, best_value=1, stop_reason="early", evaluated_value=float("nan"))
    assert TrainerState.from_dict(state.to_dict()).to_dict() | {"evaluated_value": None} == state.to_dict() | {
        "evaluated_value": None
    }
    for change in (
        {"step": "x"},
        {"step": -1},
        {"step": True},
        {"step": None},
        {"best_value": "x"},
        {"stop_reason": 1},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(change))} is not"):
            TrainerState.from_dict(state.to_dict() | change)


@pytest.mark.parametrize(
    "text", ["", "null", "[1]", "{}", '{"step": null}', '{"step": "4"}', '{"step": 5}', '{"step": true}']
)
def test_a_broken_pointer_is_code_5_with_its_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    pointer = tmp_path / "best.json"
    pointer.write_text(json.dumps({"step": 4}), encoding="utf-8")
    assert pointed_at(pointer) == tmp_path / "checkpoint-4"
    pointer.write_text(text, encoding="utf-8")
    with pytest.raises(EngineError, match=r"E5\.11.*best\.json"):
        pointed_at(pointer)
