#!/usr/bin/env python3
"""QLoRA training at the exact shapes of real models, with random weights, on one CUDA GPU: memory, speed, utilisation.

    python tools/bench/gpu_train.py llama-3.2-3b qwen3-4b qwen3-8b [--rows 8] [--length 1024] [--answer 128] [--updates 10]
    python tools/bench/gpu_train.py llama-3.2-3b --peer    # TRL's SFTTrainer on the same model and rows, and ours by its time

The model is laid out without memory and quantised layer by layer, so that no full copy ever exists. Each shape runs in a
process of its own and leaves a JSON file in tools/bench/results/. Nothing is written without a GPU; `--device cpu --tiny`
shows that it runs.

Model FLOPs count what the mathematics needs: the forward pass and the gradients of the inputs (the frozen weights need
none), attention, and the output head on supervised positions. Recomputing activations is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]
RESULTS = HERE / "results"

from shapes import SHAPES, values_of  # noqa: E402

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from engine.recipe.schema import Recipe

GOALS_GIB = {"llama-3.2-3b": 6.0, "qwen3-4b": 8.0, "qwen3-8b": 12.0, "llama-3-8b": 12.0}
# Dense 16-bit matrix products per second, from the makers' data sheets
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12, "T4": 65e12}


@dataclass(frozen=True)
class Load:
    """One update's data: `rows` of `length` tokens, the last `answer` of each supervised."""

    rows: int
    length: int
    answer: int


def measured_recipe(folder: Path, load: Load, device: torch.device) -> Recipe:
    """The recipe that this benchmark measures: the shipped QLoRA settings."""
    from engine.recipe.schema import Recipe

    return Recipe(
        model={"name_or_path": str(folder)},
        tokenizer={"added_tokens": []},
        quantization={"load_in_4bit": True},
        data={"max_source_length": load.length - load.answer, "max_target_length": load.answer},
        training={
            "per_device_train_batch_size": load.rows,
            "gradient_checkpointing": True,
            "learning_rate": 2e-5,
            "weight_decay": 0.1,
            "max_grad_norm": 1.2,
            "optim": "paged_adamw_32bit" if device.type == "cuda" else "adamw",
        },
        evaluation={"generate": False},
    )


def build(
    values: dict[str, Any], recipe: Recipe, device: torch.device, dtype: torch.dtype, *, recompute: bool = True
) -> nn.Module:
    """The model with random weights, linears in 4 bits, adapters on top; filled layer by layer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from engine.models import adapters, weights

    overrides = {key: value for key, value in values.items() if key != "model_type"}
    config = AutoConfig.for_model(values["model_type"], **overrides)
    with torch.device("meta"):
        model = weights.cast(AutoModelForCausalLM.from_config(config, dtype=torch.float32), dtype)
    torch.manual_seed(0)
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and child is not head:
                setattr(parent, name, four_bit(child, recipe, device, dtype))
    fill(model, device, dtype)
    model.is_loaded_in_4bit = True
    model.config.name_or_path = "random"
    model = adapters.attach(model, recipe.lora, base_name="random", revision=None)
    if recompute:
        weights.recompute_activations(model, frozen_embeddings=True)
    return model.train()


def four_bit(linear: nn.Linear, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A linear with random weights in bitsandbytes' format; only this one layer ever exists in 16 bits."""
    import bitsandbytes
    import torch

    settings = recipe.quantization
    made = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        compress_statistics=settings.bnb_4bit_use_double_quant,
        quant_type=settings.bnb_4bit_quant_type,
        device="meta",
    )
    weight = torch.empty(linear.weight.shape, dtype=dtype, device=device).normal_(std=0.02)
    made.weight = bitsandbytes.nn.Params4bit(
        weight.cpu() if device.type == "cuda" else weight,  # quantised by the move to the GPU
        requires_grad=False,
        compress_statistics=settings.bnb_4bit_use_double_quant,
        quant_type=settings.bnb_4bit_quant_type,
    ).to(device)
    if linear.bias is not None:
        made.bias = torch.nn.Parameter(torch.zeros(linear.out_features, dtype=dtype, device=device))
    return made


def fill(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Everything that is still without memory: embeddings, norms, and the rotary tables computed anew."""
    import torch

    made: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if "RotaryEmbedding" in type(child).__name__:
                setattr(module, name, type(child)(config=model.config).to(device))
        for name, parameter in list(module._parameters.items()):
            if parameter is None or parameter.device.type != "meta":
                continue
            if id(parameter) not in made:
                filled = torch.empty(parameter.shape, dtype=dtype, device=device)
                filled = filled.fill_(1.0) if parameter.ndim == 1 else filled.normal_(std=0.02)
                made[id(parameter)] = torch.nn.Parameter(filled, requires_grad=False)
            module._parameters[name] = made[id(parameter)]


def make_batch(vocabulary: int, load: Load, device: torch.device, seed: int) -> dict[str, Tensor]:
    import torch

    from engine.data.collate import IGNORE_INDEX

    ids = torch.randint(0, vocabulary, (load.rows, load.length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : load.length - load.answer] = IGNORE_INDEX
    return {name: t.to(device) for name, t in
            (("input_ids", ids), ("attention_mask", torch.ones_like(ids)), ("labels", labels))}  # fmt: skip


def updates(
    model: nn.Module, recipe: Recipe, load: Load, device: torch.device, precision: str, count: int
) -> list[float]:
    """Seconds of each update, as the training loop makes it: summed loss, backward, clip, step."""
    import torch

    from engine.loss.cross_entropy import summed_cross_entropy
    from engine.models import adapters
    from engine.training import optim

    training = recipe.training
    optimizer = optim.build_optimizer(optim.parameter_groups(model, training.weight_decay), training, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    parameters = [p for p in model.parameters() if p.requires_grad]
    seconds = []
    for number in range(count):
        batch = make_batch(model.config.vocab_size, load, device, number)
        synchronise(device)
        started = time.perf_counter()
        with torch.autocast(device.type, dtype=adapters.DTYPES[precision], enabled=precision != "fp32"):
            loss = summed_cross_entropy(model, batch) / (load.rows * load.answer)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return seconds


def synchronise(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def model_flops(values: dict[str, Any], load: Load, adapter_weights: int) -> float:
    """Floating-point operations that one update needs, without recomputation.

    A frozen matrix of n weights costs 2n per token forward and 2n for the gradient of its input; an adapter also 2n for its
    own. Attention is causal: on average a token looks at half the row.
    """
    heads, size, layers = values["num_attention_heads"], values["head_dim"], values["num_hidden_layers"]
    hidden, inner, kv = values["hidden_size"], values["intermediate_size"], values["num_key_value_heads"]
    linear = layers * (2 * hidden * heads * size + 2 * hidden * kv * size + 3 * hidden * inner)
    tokens = load.rows * load.length
    attention = layers * 2 * 2 * heads * size * load.length / 2  # scores and mixed values, per token, forward
    head = 4 * values["vocab_size"] * hidden * load.rows * load.answer
    return tokens * (4 * linear + 6 * adapter_weights + 3 * attention) + head


def measure(shape: str, load: Load, options: argparse.Namespace) -> dict[str, Any]:
    """One shape on the current GPU."""
    import torch

    from engine.models import adapters
    from engine.models.weights import default_precision
    from engine.runtime.peak_memory import measured_peak
    from engine.training import memory

    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    precision = default_precision(device)
    precision = "fp16" if precision == "fp32" and device.type == "cuda" else precision
    values = values_of(shape, options.tiny)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        recipe = measured_recipe(Path(folder), load, device)
        estimate = memory.estimate(recipe, precision=precision, device=device)
    dtype = adapters.DTYPES[precision]
    model = build(values, recipe, device, dtype)
    adapter_weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    updates(model, recipe, load, device, precision, 2)  # warm-up: kernels, optimizer state
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = sorted(updates(model, recipe, load, device, precision, options.updates))
    median = seconds[len(seconds) // 2]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak_flops = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
    used = model_flops(values, load, adapter_weights) / median
    found = {
        "shape": shape,
        "parameters": estimate["parameters"],
        "adapter_parameters": adapter_weights,
        "load": vars(load),
        "precision": precision,
        "peak_gib": measured_peak(device),
        "estimated_peak_gib": estimate["training_peak"] / 2**30,
        "goal_gib": GOALS_GIB[shape],
        "median_seconds": median,
        "fastest_seconds": seconds[0],
        "slowest_seconds": seconds[-1],
        "updates": options.updates,
        "tokens_per_second": load.rows * load.length / median,
        "model_flops_per_second": used,
        "mfu": None if peak_flops is None else used / peak_flops,
        **versions(name),
    }
    if options.peer:
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        theirs = peer_seconds(build(values, recipe, device, dtype, recompute=False), recipe, load, options.updates)
        found |= {"trl_median_seconds": theirs, "times_trl": theirs / median, "trl_peak_gib": measured_peak(device)}
    return found


def peer_seconds(model: nn.Module, recipe: Recipe, load: Load, count: int) -> float:
    """Median seconds of an update of TRL's `SFTTrainer`, on rows of the same size, the same model and settings."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    moments: list[float] = []
    device = next(model.parameters()).device

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronise(device)
            moments.append(time.perf_counter())

    rows = load.rows * (count + 2)
    ids = torch.randint(0, model.config.vocab_size, (rows, load.length), generator=torch.Generator().manual_seed(0))
    mask = [[0] * (load.length - load.answer) + [1] * load.answer] * rows
    training = recipe.training
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, max_steps=count + 2, per_device_train_batch_size=load.rows, max_length=None,
            learning_rate=training.learning_rate, weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            optim="adamw_torch" if training.optim == "adamw" else training.optim, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False}, completion_only_loss=True,
            bf16=device.type == "cuda", use_cpu=device.type == "cpu", save_strategy="no", report_to=[],
            disable_tqdm=True, logging_steps=count + 2,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=settings, processing_class=any_tokenizer(),
            train_dataset=Dataset.from_dict({"input_ids": ids.tolist(), "completion_mask": mask}), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    laps = sorted(after - before for before, after in itertools.pairwise(moments[1:]))  # two updates warm up
    return laps[len(laps) // 2]


def any_tokenizer() -> Any:
    """TRL wants one, although the rows come as token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="</s>")


def versions(device_name: str) -> dict[str, Any]:
    import bitsandbytes
    import peft
    import torch
    import transformers

    return {
        "device": device_name,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shapes", nargs="+", choices=list(GOALS_GIB))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--answer", type=int, default=128, help="supervised tokens of a row")
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--peer", action="store_true", help="measure TRL's trainer too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON files")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy of the same kind")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU; nothing was measured and nothing was written", file=sys.stderr)
        return 4
    if not options.here and len(options.shapes) > 1:
        return max(in_child(shape) for shape in options.shapes)
    (shape,) = options.shapes
    result = measure(shape, Load(options.rows, options.length, options.answer), options)
    options.results.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    path = options.results / f"gpu_train_{shape}_{device}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    mfu = "unknown" if result["mfu"] is None else f"{100 * result['mfu']:.1f} %"
    print(
        f"{shape}: peak {result['peak_gib']:.2f} GiB (goal {result['goal_gib']:g}, estimated "
        f"{result['estimated_peak_gib']:.2f}), {result['tokens_per_second']:,.0f} tokens/s, MFU {mfu} -> {path}"
    )
    return 0


def in_child(shape: str) -> int:
    """Each shape starts with an empty GPU."""
    given = [argument for argument in sys.argv[1:] if argument not in SHAPES]
    return subprocess.run([sys.executable, __file__, shape, *given, "--here"], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
