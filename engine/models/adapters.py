"""Adapters by peft: LoRA, QLoRA, rsLoRA, DoRA, LoRA+, and trained embedding rows for added tokens.

Adapter weights are float32 whatever the base is stored in: fp16 gradients cannot be unscaled, and bf16 has too few
digits for small updates to add up.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import families
from engine.errors import EngineError
from engine.models.hub import weight_names
from engine.runtime.faults import blaming

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    from engine.recipe.schema import Lora, Quantization, Recipe

log = logging.getLogger("engine.models")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# On CPUs bitsandbytes advises an add-on that downloads compiled code; it is not wanted here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def enabled(recipe: Recipe) -> bool:
    """Whether the recipe trains adapters: `lora.enabled`, or where that is open, with a 4-bit base."""
    return recipe.quantization.load_in_4bit if recipe.lora.enabled is None else recipe.lora.enabled


def compute_dtype(wanted: str, precision: str, device: torch.device) -> torch.dtype:
    """Type of the matrix products with a 4-bit base.

    A GPU without bf16 (Turing and older) emulates it slowly and in part; fp16 stands in there, with the loss scaler
    that fp16 training has anyway.
    """
    name = precision if wanted == "auto" else wanted
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        log.warning("%s has no bf16 arithmetic: the 4-bit base computes in fp16", torch.cuda.get_device_name(device))
        name = "fp16"
    return DTYPES[name]


def quantization_config(settings: Quantization, precision: str, device: torch.device) -> BitsAndBytesConfig:
    """4-bit loading as the recipe has it. bitsandbytes is imported only here and by its optimizers.

    Raises:
        EngineError: E4.13 where bitsandbytes cannot be used.
    """
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # a missing CUDA library shows as OSError or RuntimeError
        what = f"bitsandbytes cannot be used: {error}"
        advice = "install bitsandbytes for this machine, or set quantization.load_in_4bit=false"
        raise EngineError("E4.13", what, "quantization.load_in_4bit", advice) from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute_dtype(settings.bnb_4bit_compute_dtype, precision, device),
    )


def is_4bit(model: nn.Module) -> bool:
    return any(type(parameter).__name__ == "Params4bit" for parameter in model.parameters())


def keep_weights_as_loaded(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at their first use in eval mode on a CPU.

    Its format for CPUs with AVX512-BF16 rounds the scales and stays after the return to training, so that one
    evaluation would change all later losses; it also fails on layers whose width is not a multiple of the block.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def target_modules(setting: list[str] | str, model: nn.Module) -> list[str] | str:
    """Names of the linears to adapt: the recipe's own, or those of the model's family.

    Raises:
        EngineError: E2.57 for a name that the model does not have, or a family without a list.
    """
    if setting == "all-linear":
        return setting
    model_type = model.config.model_type
    linears = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "weight")}
    if setting == "auto":
        targets = [name for name in families.of(model_type).lora_targets if name in linears]
        if not targets:
            raise _no_targets(f"lora.target_modules: auto has no list for model type {model_type!r}", linears)
        return targets
    paths = [name for name, _ in model.named_modules()]
    missing = [name for name in setting if not any(path == name or path.endswith(f".{name}") for path in paths)]
    if missing:
        raise _no_targets(f"lora.target_modules: the model has no module named {', '.join(missing)}", linears)
    return list(setting)


def _no_targets(what: str, linears: set[str]) -> EngineError:
    names = ", ".join(sorted(name for name in linears if "norm" not in name))
    return EngineError("E2.57", what, f"modules with weights: {names}", "name some of these, or all-linear")


def attach(
    model: nn.Module, settings: Lora, *, new_token_ids: Sequence[int] = (), base_name: str, revision: str | None
) -> PeftModel:
    """Freeze the base and put trainable float32 adapters on it.

    Args:
        new_token_ids: embedding rows that the base has never seen; they are stored with the adapter and, if
            `train_added_tokens`, trained: all other rows stay as they are.
        base_name: how the saved adapter names its base: the hub id, or an absolute folder.
    """
    from peft import LoraConfig, get_peft_model

    _freeze(model)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=target_modules(settings.target_modules, model),
        bias=settings.bias,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        modules_to_save=settings.modules_to_save,
        trainable_token_indices=_token_rows(model, new_token_ids),
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        base_model_name_or_path=base_name,
        revision=revision,
    )
    try:
        with _quiet_peft():
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise EngineError("E2.57", str(error), "lora", "change the lora section") from error
    for adapter_config in adapted.peft_config.values():
        adapter_config.base_model_name_or_path, adapter_config.revision = base_name, revision
    return finish(adapted, train_rows=settings.train_added_tokens)


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """peft's warnings are about names that transformers deprecates and a base renamed here, not about the recipe."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path.*")
        yield


def finish(model: PeftModel, *, train_rows: bool = True, trainable: bool = True) -> PeftModel:
    """What every adapted model needs: float32 trainable weights and cheap token rows."""
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.requires_grad_(trainable and train_rows)
            parameter.data = parameter.data.float()
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    make_token_rows_cheap(model)
    return model


def _freeze(model: nn.Module) -> None:
    model.requires_grad_(False)
    if is_4bit(model):
        model.enable_input_require_grads()  # recomputed blocks need an input with a gradient; embeddings now give none


def _token_rows(model: nn.Module, ids: Sequence[int]) -> dict[str, list[int]] | None:
    """peft's `trainable_token_indices`: rows of the embedding, and of an untied output head too."""
    if not ids:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    rows = {names[id(embedding)].rsplit(".", 1)[-1]: sorted(ids)}
    if head is not None and head.weight is not embedding.weight:
        if head.bias is not None:
            log.warning("the output head has a bias: rows of added tokens are trained in the embedding only")
        else:
            rows[names[id(head)].rsplit(".", 1)[-1]] = sorted(ids)
    return rows


class CheapTokenRows:
    """Forward of peft's TrainableTokensLayer without its copy of the whole embedding matrix.

    peft writes the trained rows into a copy of the (V, D) matrix in every call, and a gradient of that size comes
    back. Here the frozen matrix is used as it is and only the outputs that belong to trained rows are replaced: the
    same numbers, D x rows of extra memory. Mixed into the layer's class, so saving, merging and loading stay peft's.
    """

    def forward_adapters(self, x: Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or len(active_adapters) != 1:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        name = active_adapters[0]
        rows = self.trainable_tokens_delta[name]  # (R, D)
        ids = self._row_ids(name, x.device)  # (R,)
        if isinstance(self.base_layer, nn.Embedding):
            return self._embed(x, rows, ids)
        logits = self.base_layer(x)  # (..., V)
        return logits.index_copy(-1, ids, F.linear(x, rows.to(x.dtype)).to(logits.dtype))

    def _embed(self, x: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        hidden = self.base_layer(x)  # (B, T, D)
        scale = self._get_embed_scale()
        rows = rows.to(hidden.dtype) if scale is None else (rows * scale).to(hidden.dtype)
        match = x.unsqueeze(-1) == ids  # (B, T, R)
        # A product with a one-hot matrix would round; picking rows does not.
        picked = F.embedding(match.int().argmax(-1), rows)
        return torch.where(match.any(-1, keepdim=True), picked, hidden)

    def _row_ids(self, name: str, device: torch.device) -> Tensor:
        cached = self.__dict__.get("_row_ids_cache")
        if cached is None or cached.device != device or len(cached) != len(self.token_indices[name]):
            cached = torch.tensor(self.token_indices[name], device=device)
            self.__dict__["_row_ids_cache"] = cached
        return cached


def make_token_rows_cheap(model: nn.Module) -> None:
    """Give every TrainableTokensLayer of the model the forward of `CheapTokenRows`."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    for module in model.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = _cheap_class()


@cache
def _cheap_class() -> type:
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    return type("CheapTrainableTokensLayer", (CheapTokenRows, TrainableTokensLayer), {})


def load(model: nn.Module, folder: Path, *, trainable: bool) -> PeftModel:
    """Put the adapter of a checked folder on its base.

    Raises:
        EngineError: E4.8 where the adapter is damaged, incomplete, or does not fit the base.
    """
    from peft import PeftModel

    if trainable:
        _freeze(model)
    stored = weight_names(folder)
    what, next = "the adapter does not fit its base", "name the base it was trained on"
    with blaming("E4.8", what, folder, next, safe="nothing was changed"), _quiet_peft():
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=trainable, use_safetensors=True)
        own = adapter_tensors(adapted).keys()
    # peft leaves what is missing as it was drawn, and says nothing of what its settings have no place for.
    unplaced = {name for name in stored - own if ".lora_" in name}
    for problem, names in (("missing", own - stored), ("not in its settings", unplaced)):
        if names:
            what = f"{len(names)} weights of the adapter are {problem}, first {min(names)}"
            raise EngineError("E4.8", what, str(folder), "copy the adapter folder again", safe="nothing was changed")
    return finish(adapted, trainable=trainable)


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """What a saved adapter holds: adapters, fully trained modules and token rows; never the base."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)


def live_tensors(model: PeftModel) -> dict[str, Tensor]:
    """What `adapter_tensors` holds under the model's own names, trained or not: token rows may be frozen
    (`train_added_tokens: false`), and so are adapters that no gradient reaches."""
    from peft import get_peft_model_state_dict

    everything = model.state_dict(keep_vars=True)  # the parameters themselves
    held = get_peft_model_state_dict(model, state_dict=everything, save_embedding_layers=False)
    kept = {id(tensor) for tensor in held.values()}
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad or id(p) in kept}


def loraplus_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float, loraplus_lr_ratio: float
) -> list[dict[str, Any]]:
    """LoRA+: optimizer groups in which B learns `loraplus_lr_ratio` times as fast as A (Hayou et al., 2024).

    peft's own helper sorts the parameters; rows of added tokens are no LoRA matrices and learn at the base rate.
    """
    from peft.optimizers import create_loraplus_optimizer

    helper = create_loraplus_optimizer(
        model,
        torch.optim.SGD,
        lr=learning_rate,
        loraplus_lr_ratio=loraplus_lr_ratio,
        loraplus_weight_decay=weight_decay,
        loraplus_lr_embedding=learning_rate,
    )
    groups = []
    for group in helper.param_groups:
        for decayed in (True, False):
            members = [p for p in group["params"] if (p.ndim >= 2) == decayed]  # biases and norms have one dimension
            decay = group["weight_decay"] if decayed else 0.0
            groups.append({"params": members, "lr": group["lr"], "weight_decay": decay})
    return [group for group in groups if group["params"]]
