"""How much memory a run needs, from its recipe and the model's configuration alone: nothing is loaded or computed.

Weights, gradients and optimizer states are counted exactly on a model without data. Activations are counted by running
the forward pass of a shallow copy on tensors that have shapes but no contents, and scaling up by the number of layers.
B examples, S source tokens, T target tokens, N supervised positions, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine import families
from engine.data import vocabulary
from engine.loss import output_head
from engine.models import adapters, configuration, hub, sharding, tokenization, weights
from engine.models.size import by_layers, check_depth, device_bytes, size_text
from engine.training.batch_size import longest_rows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from engine.recipe.schema import Quantization, Recipe

log = logging.getLogger("engine.memory")

_QUANT_BLOCK, _SCALE_BLOCK = 64, 256  # bitsandbytes: weights per scale, scales per scale of scales
_OPTIMIZER_BLOCK, _OPTIMIZER_MIN = 256, 4096  # bitsandbytes: 8-bit states of a block; smaller tensors keep 32 bits
_PARTS = (
    ("weights", "weights"),
    ("gradients", "gradients of the trainable weights"),
    ("gradient_buckets", "buckets of DistributedDataParallel"),
    ("gathered", "weights gathered from the other ranks, and their gradients"),
    ("optimizer", "optimizer state"),
    ("activations", "activations kept for the backward pass"),
    ("logits", "a piece of the logits, and its gradients"),
    ("workspace", "one layer's weights out of 4 bits"),
    ("kv_cache", "key/value cache of an evaluation"),
)


def estimate(
    recipe: Recipe,
    *,
    precision: str | None = None,
    device: torch.device | None = None,
    world_size: int = 1,
    sharded: bool = False,
) -> dict[str, Any]:
    """Bytes on one device, for the longest rows that the recipe lets through.

    Args:
        sharded: the ranks hold the model in parts, as `models.sharding` lays them out.

    Returns:
        Bytes by part (`weights`, `gradients`, `optimizer`, `activations`, `logits`, `kv_cache`, ...), `training_peak`,
        `evaluation_peak` and `peak`; `parameters`, `trainable_parameters` and the `shape` they hold for.

    Raises:
        EngineError: where the model's configuration cannot be had.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if precision is None:
        wanted = recipe.training.precision
        precision = weights.default_precision(device) if wanted == "auto" else wanted
    config, new_tokens = _config(recipe)
    check_depth(config)
    model = hollow_model(config, recipe, precision, new_tokens)
    shape = _shape(recipe, config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trainable)
    parts = {
        "weights": _weight_bytes(model, recipe.quantization),
        "gradients": 4 * count,
        "gradient_buckets": 4 * count if world_size > 1 else 0,
        "optimizer": _optimizer_bytes(trainable, recipe.training.optim),
        "activations": _activations(config, recipe, precision, new_tokens, shape),
        "logits": _logit_bytes(model, shape, precision),
        "gathered": 0,
        "workspace": _workspace(model, recipe.quantization),
        "kv_cache": _cache_bytes(config, shape, precision),
    }
    if sharded:
        for name in ("weights", "gradients", "optimizer"):
            parts[name] = -(-parts[name] // world_size)
        parts |= {"gradient_buckets": 0, "gathered": _gathered_bytes(model)}
    resident = parts["weights"] + parts["optimizer"]
    step = sum(
        parts[name] for name in ("gradients", "gradient_buckets", "gathered", "activations", "logits", "workspace")
    )
    peaks = {"training_peak": resident + step, "evaluation_peak": resident + parts["workspace"] + parts["kv_cache"]}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": count,
        "precision": precision,
        "shape": shape,
        **parts,
        **peaks,
        "peak": max(peaks.values()),
    }


def table(estimate: dict[str, Any], device: torch.device) -> str:
    """The estimate in lines for people, with a warning where it exceeds the device."""
    shape = estimate["shape"]
    lines = [
        f"memory estimate for one device, {estimate['precision']}, {shape['examples']} x {shape['source']} source and "
        f"{shape['target']} target tokens:"
    ]
    lines += [f"  {size_text(estimate[key])}  {label}" for key, label in _PARTS if estimate[key]]
    lines.append(
        f"  {size_text(estimate['peak'])}  at the peak, of {size_text(device_bytes(device)).strip()} on {device}"
    )
    if exceeds(estimate, device):
        lines.append(
            "  warning: this will probably not fit; lower per_device_train_batch_size (and raise "
            "gradient_accumulation_steps) or tokens_per_batch, or set gradient_checkpointing or quantization.load_in_4bit"
        )
    return "\n".join(lines)


def exceeds(estimate: dict[str, Any], device: torch.device) -> bool:
    return estimate["peak"] > device_bytes(device)


# The model without its contents


def _config(recipe: Recipe) -> tuple[PreTrainedConfig, int]:
    """The configuration with the vocabulary that training will have, and the number of rows new to the model."""
    settings, added = recipe.model, recipe.tokenizer.added_tokens
    folder, rules = None, {"trust_remote_code": settings.trust_remote_code, "weights": False}
    if settings.name_or_path is not None:
        folder = hub.resolve(settings.name_or_path, revision=settings.revision, **rules)
        if hub.is_adapter(folder):
            folder = hub.resolve_base(folder, **rules).folder
    config = configuration.load_config(settings, folder)
    if settings.init == "random":
        if recipe.tokenizer.name_or_path is None and folder is None:
            config.vocab_size = recipe.tokenizer.train_vocab_size or vocabulary.DEFAULT_VOCABULARY
        return config, 0
    if folder is None:
        return config, len(added)
    name = recipe.tokenizer.name_or_path
    where = folder if name is None else hub.resolve(name, weights=False)
    if not tokenization.has_tokenizer(where):
        return config, len(added)
    tokenizer = tokenization.load_tokenizer(where, trust_remote_code=settings.trust_remote_code and name is None)
    known = tokenizer.get_vocab()
    new = sum(token not in known for token in added)
    if new:
        config.vocab_size = max(config.vocab_size, len(tokenizer) + new)
    return config, new


def hollow_model(config: PreTrainedConfig, recipe: Recipe, precision: str, new_tokens: int) -> nn.Module:
    """The model as training has it, on the meta device: adapters, types and what is trainable are real."""
    lora = adapters.enabled(recipe)
    dtype = adapters.DTYPES[precision] if lora else torch.float32
    wanted = recipe.model.attn_implementation
    # That one runs on GPUs only. Where the flag is not said, transformers asks on standard input.
    options = weights.attention(None if wanted == "flash_attention_2" else wanted)
    options["trust_remote_code"] = recipe.model.trust_remote_code
    with torch.device("meta"):
        model = weights.auto_class(config).from_config(copy.deepcopy(config), dtype=torch.float32, **options)
        model = weights.cast(model, dtype)
        if lora:
            rows = range(config.vocab_size - new_tokens, config.vocab_size)
            model = adapters.attach(model, recipe.lora, new_token_ids=list(rows), base_name="estimate", revision=None)
    return model.train()


def _shape(recipe: Recipe, config: PreTrainedConfig) -> dict[str, int]:
    """The longest batches of the recipe: what training and evaluation must hold at once."""
    generation, data = recipe.generation, recipe.data
    return {
        "examples": longest_rows(recipe),
        "source": data.max_source_length,
        "target": data.max_target_length,
        "decoded_examples": recipe.evaluation.per_device_eval_batch_size if recipe.evaluation.generate else 0,
        "beams": generation.num_beams,
        "new_tokens": generation.max_new_tokens or data.max_target_length,
    }


# Exact parts


def _quantised(model: nn.Module) -> list[nn.Linear]:
    """Linears that bitsandbytes would hold in 4 bits: all of the base but the output head."""
    head = model.get_output_embeddings()
    own = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [module for name, module in own if module is not head and "lora_" not in name and "lm_head" not in name]


def _weight_bytes(model: nn.Module, settings: Quantization) -> int:
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    total += sum(b.numel() * b.element_size() for b in model.buffers())
    if settings.load_in_4bit:
        for linear in _quantised(model):
            weight = linear.weight
            total += four_bit_bytes(weight.numel(), settings.bnb_4bit_use_double_quant)
            total -= weight.numel() * weight.element_size()
    return total


def four_bit_bytes(count: int, double_quant: bool) -> int:
    """Bytes of one 4-bit matrix of `count` weights with its scales and code tables."""
    scales = math.ceil(count / _QUANT_BLOCK)
    tables = 16 * 4
    if not double_quant:
        return count // 2 + 4 * scales + tables
    return count // 2 + scales + 4 * math.ceil(scales / _SCALE_BLOCK) + tables + 256 * 4 + 4


def _optimizer_bytes(trainable: list[nn.Parameter], optim: str) -> int:
    """Two moments per weight: 32 bits each, or 8 bits with a scale per block."""
    if not optim.endswith("8bit"):
        return sum(8 * p.numel() for p in trainable)
    small = sum(8 * p.numel() for p in trainable if p.numel() < _OPTIMIZER_MIN)
    large = [p.numel() for p in trainable if p.numel() >= _OPTIMIZER_MIN]
    return small + sum(2 * n + 8 * math.ceil(n / _OPTIMIZER_BLOCK) for n in large)


# Parts that depend on the batch


def _logit_bytes(model: nn.Module, shape: dict[str, int], precision: str) -> int:
    """Of n x V numbers of one piece: logits and log-probabilities in float32, their gradient in the compute type; beside
    them the head's weights in that type, and one piece's share of their gradient."""
    weight = model.get_output_embeddings().weight
    rows = min(shape["examples"] * shape["target"], output_head.piece_rows(len(weight)))
    piece = rows * len(weight) * (8 if precision == "fp32" else 10)
    if weight.dtype == adapters.DTYPES[precision]:
        return piece
    return piece + 2 * weight.numel() * (2 if weight.requires_grad else 1)


def _gathered_bytes(model: nn.Module) -> int:
    """What a rank holds whole: embeddings, head and last norm all along, the layer at work, the next one being fetched;
    and the gradients of one of these at a time."""
    layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in sharding.layers(model)]
    rest = sum(p.numel() * p.element_size() for p in model.parameters()) - sum(layers)
    largest = max(layers, default=0)
    return rest + 2 * largest + max(rest, largest)


def _workspace(model: nn.Module, settings: Quantization) -> int:
    if not settings.load_in_4bit:
        return 0
    return max(linear.weight.numel() * linear.weight.element_size() for linear in _quantised(model))


def _cache_bytes(config: PreTrainedConfig, shape: dict[str, int], precision: str) -> int:
    """Our beam search keeps one prompt per example and one new token per beam and step."""
    width = 2 if precision != "fp32" else 4
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1)
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    hidden = heads * (size or config.hidden_size // config.num_attention_heads)
    layers = getattr(config, families.of(config.model_type).depths[-1])
    slots = shape["source"] + shape["beams"] * shape["new_tokens"]
    return 2 * layers * shape["decoded_examples"] * slots * hidden * width


def _activations(
    config: PreTrainedConfig, recipe: Recipe, precision: str, new_tokens: int, shape: dict[str, int]
) -> int:
    """Bytes that autograd keeps for the backward pass; with checkpointing, layer inputs and one layer's activations."""
    depths = [getattr(config, key) for key in families.of(config.model_type).depths]

    def kept(shallow: PreTrainedConfig) -> int:
        return saved_bytes(hollow_model(shallow, recipe, precision, new_tokens), shape, precision)

    outside, layers = by_layers(config, kept)
    if not recipe.training.gradient_checkpointing:
        return outside + sum(cost * depth for cost, depth in zip(layers, depths, strict=True))
    width = 2 if precision != "fp32" else 4
    tokens = [shape["source"], shape["target"]] if config.is_encoder_decoder else [shape["source"] + shape["target"]]
    inputs = sum(
        depth * shape["examples"] * length * config.hidden_size * width
        for depth, length in zip(depths, tokens, strict=True)
    )
    return outside + inputs + max(layers)


def saved_bytes(model: nn.Module, shape: dict[str, int], precision: str) -> int:
    """Bytes of all tensors that one forward pass saves for its backward pass, without weights and logits.

    Runs on tensors without contents, so it costs neither memory nor arithmetic.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        _give_shapes(model)
        for module in model.modules():
            if hasattr(module, "layerdrop"):
                module.training = False  # whether to drop a layer is drawn, and these tensors have no values
        inputs = _inputs(model, shape)
        positions = shape["examples"] * shape["target"]
        handle = model.get_output_embeddings().register_forward_pre_hook(
            lambda _, arguments: (arguments[0].reshape(-1, arguments[0].shape[-1])[:positions],)
        )
        known = {p.untyped_storage()._cdata for p in model.parameters()}
        kept = SavedTensors(known)
        with kept, torch.autocast("cpu", dtype=adapters.DTYPES[precision], enabled=precision != "fp32"):
            model(**inputs, use_cache=False)
        handle.remove()
    return kept.total


def _give_shapes(model: nn.Module) -> None:
    """Move meta weights into the current FakeTensorMode, where they act as tensors of a real device."""
    moved: dict[int, Tensor] = {}  # tied weights stay one tensor
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            store |= {name: _shaped(tensor, moved) for name, tensor in store.items() if tensor is not None}


def _shaped(tensor: Tensor, moved: dict[int, Tensor]) -> Tensor:
    """An empty tensor like `tensor`: the one in `moved` if that has met it before."""
    if id(tensor) not in moved:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        moved[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return moved[id(tensor)]


def _inputs(model: nn.Module, shape: dict[str, int]) -> dict[str, Tensor]:
    examples, source, target = shape["examples"], shape["source"], shape["target"]
    if not model.config.is_encoder_decoder:
        source += target
    inputs = {name: torch.ones(examples, source, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.ones(examples, target, dtype=torch.int64)
    return inputs


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Context that adds up what autograd saves. Views of one storage count once; storages in `ignored` not at all."""

    def __init__(self, ignored: set[int]) -> None:
        self._storages: dict[int, Any] = {}
        self._ignored = ignored
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._ignored:
            self._storages[storage._cdata] = storage  # held, so that no other storage takes its address
        return tensor

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())
