"""Sharding in a world of one rank: what is spread comes back whole, under its own names and to the bit."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import adapted
import built
import pytest
import tiny
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from engine.loss.cross_entropy import supervised_tokens
from engine.models import sharding, weights
from engine.models.build import build_model
from engine.recipe.schema import Training
from engine.train import train_step
from engine.training import optim
from engine.training.state import Window

MEASURED = Path(__file__).resolve().parent.parent / "measured_ranks.py"


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def spread(family):
    model = tiny.model(family)
    plain = copy.deepcopy(model)
    sharding.shard(model, torch.device("cpu"), param_dtype=None, cpu_offload=False)
    return model, plain


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_weights_come_back_whole(alone, tmp_path, family):
    model, plain = spread(family)
    assert sharding.is_sharded(model) and not sharding.is_sharded(plain)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    found, expected = weights.weights_of(model), plain.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    names = [name for name in found if found[name].data_ptr() == found["lm_head.weight"].data_ptr()]
    assert (len(names) > 1) is tied

    plain.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    weights.load_weights(model, tmp_path / "saved")
    found = weights.weights_of(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_moments_come_back_whole(alone):
    model, plain = spread("bart")
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, plain)]
    batch = tiny.batch_for("bart")
    for m, optimizer in zip((model, plain), optimizers, strict=True):
        m.eval()(**batch).loss.backward()  # without dropout
        optimizer.step()
    saved = sharding.gathered(optimizers[0].state_dict())
    expected = optimizers[1].state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    for index, moments in expected["state"].items():
        for name, value in moments.items():
            assert type(saved["state"][index][name]) is torch.Tensor
            assert torch.allclose(saved["state"][index][name], value, atol=1e-7), (index, name)

    again = torch.optim.AdamW(model.parameters(), lr=1e-3)
    again.load_state_dict(sharding.parts_of_moments(again, saved))
    back = sharding.gathered(again.state_dict())
    assert all(
        torch.equal(back["state"][i][name], value)
        for i, moments in saved["state"].items()
        for name, value in moments.items()
    )


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_decodes_whole_and_is_sharded_again(alone, family):
    model, plain = spread(family)
    batch = {name: tensor for name, tensor in tiny.batch_for(family).items() if name in ("input_ids", "attention_mask")}
    model(**tiny.batch_for(family))  # as in training, which always comes first
    with torch.no_grad():
        expected = plain.eval().generate(**batch, max_new_tokens=4, num_beams=2)
        with sharding.whole(model.eval()):
            assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
            for _ in range(2):
                assert torch.equal(model.generate(**batch, max_new_tokens=4, num_beams=2), expected)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


@pytest.fixture
def alone_on_a_gpu(tmp_path, gpu):
    backend = "cuda:nccl,cpu:gloo" if gpu.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield gpu
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("family", ["bart", "llama"])
def test_on_a_gpu_a_sharded_model_trains_like_a_whole_one(alone_on_a_gpu, family, offload):
    device = alone_on_a_gpu
    plain, model = tiny.model(family).to(device), tiny.model(family)
    sharding.shard(model, device, param_dtype=None, cpu_offload=offload)
    batch, training = tiny.batch_for(family), Training(learning_rate=1e-3, warmup_steps=0)
    window = Window([batch], int(supervised_tokens(batch)), all_tokens=60, ids=["row_1"])
    runtime = SimpleNamespace(
        world_size=1,
        device=device,
        ranks=SimpleNamespace(sum_across_ranks=lambda tensor: tensor),
        autocast=nullcontext,
        to_device=lambda batch: {name: tensor.to(device) for name, tensor in batch.items()},
    )
    for one in (plain, model):
        optimizer = torch.optim.AdamW(one.eval().parameters(), lr=1e-3)  # without dropout
        schedule, scaler = (
            optim.build_schedule(optimizer, training, 10),
            torch.amp.GradScaler(device.type, enabled=False),
        )
        for _ in range(2):
            assert train_step(one, window, optimizer, schedule, scaler, runtime, training).applied
    found = weights.weights_of(model)
    assert all(torch.allclose(found[name].cpu(), value.cpu(), atol=1e-5) for name, value in plain.state_dict().items())


@pytest.mark.gpu
def test_bytes_of_4bit_weights_on_two_gpus(tmp_path, gpu, root):
    """Until this has passed on GPUs, QLoRA under FSDP2 stays refused: others have seen 4-bit weights come back changed."""
    pytest.importorskip("bitsandbytes")
    if gpu.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tiny.save("llama", tmp_path, **adapted.WIDE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    script = [str(root / "tests" / "four_bit_shards.py"), gpu.type, str(tmp_path)]
    command = [*launcher, "--rdzv-endpoint=localhost:0", *script]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def test_a_plain_model_passes_through():
    model = tiny.model("bart")
    tensor = next(model.parameters())
    with sharding.whole(model):
        assert sharding.full(tensor) is tensor and sharding.part_of(tensor, like=tensor) is tensor
    state = {"a": [tensor, 1], "b": None}
    assert sharding.gathered(state)["a"][0] is tensor


LORA = {"lora": {"enabled": True}}


@pytest.mark.parametrize(
    ("family", "sections"),
    [
        *((family, {}) for family in tiny.FAMILIES),
        ("llama", LORA),
        ("qwen3", LORA | {"training": {"gradient_checkpointing": True}}),
        ("llama", {"lora": {"enabled": True, "use_dora": True, "train_added_tokens": True}}),
        ("bart", {"model": {"init": "random"}}),
    ],
)
def test_a_layout_without_content_is_the_same(tmp_path, family, sections):
    sections = {"tokenizer": {"added_tokens": ["#Neu#", "#Alt#"]}} | sections
    recipe = built.recipe(tiny.save(family, tmp_path / "base"), **sections)
    whole, hollow = (build_model(recipe, device=torch.device(at), precision="fp32") for at in ("cpu", "meta"))
    assert all(tensor.is_meta for tensor in (*hollow.model.parameters(), *hollow.model.buffers()))
    assert sharding.layout(hollow.model) == sharding.layout(whole.model)
    assert hollow.report | {"device": "cpu"} == whole.report and hollow.base == whole.base
    flipped = next(whole.model.parameters())
    flipped.requires_grad_(not flipped.requires_grad)
    assert sharding.layout(hollow.model) != sharding.layout(whole.model)


@pytest.mark.skipif("FULL_TESTS" not in os.environ, reason="minutes of measuring; set FULL_TESTS=1")
def test_what_two_ranks_hold(tmp_path):
    """Beyond its part, only rank 0 ever holds the model whole, to build it; a save holds a tensor, and so does a resume."""
    command = [sys.executable, str(MEASURED), str(tmp_path)]
    # glibc keeps what is freed in pieces of less than 32 MiB for later; here it gives it back at once.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = sorted(map(json.loads, done.stdout.splitlines()), key=lambda figures: figures["rank"])
    whole, part = first["whole"], first["part"]
    layer = whole / 12
    assert first["build"] < whole + 3 * layer < 2 * whole
    assert second["build"] < part + 3 * layer < whole
    for figures in (first, second):
        assert figures["save"] < 3 * layer < 3 * whole  # of three times the model: weights and two moments
        assert figures["resume"] < 2 * part + 3 * layer  # its two moments, before the old ones go
