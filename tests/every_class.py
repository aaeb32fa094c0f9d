"""A tiny random model of any class that transformers can generate text with, out of its own default configuration.

Nothing is known here about single classes: sizes are made small by the names that configurations give them, and what
cannot be built that way is left out with the reason.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

VOCABULARY = 97
MOST_WEIGHTS = 3_000_000
CLASSES = {(kind, True): name for kind, name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.items()} | {
    (kind, False): name for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
}

# Name of a setting -> what it becomes; the first pattern that fits counts. None: drop it, the default follows the rest.
_SIZES = [
    (r".*_token_id|.*_token_index|.*_token_ids", "token"),
    (r"attention_types|ignore_keys_at_rope_validation|conv_output_size|qk_head_dim|axial_pos_.*", None),
    (r"mlp_only_layers|moe_layers|full_attn_idxs|hybrid_layer_ids|attn_layers|layer_rope_theta|.*_layers_indices", None),
    (r".*vocab_size(_per_layer_input)?", VOCABULARY),
    (r"(num_|n_)?(hidden_|decoder_|encoder_)?layers?|n_layer", "layers"),
    (r".*(kv|key_value|query)_(heads|groups)|num_key_value_heads", "key_heads"),
    (r".*heads|n_head", 4),
    (r"(.*_)?hidden_size|d_model|n_embd|embed_dim|emb_dim|dim|embedding_dim|word_embed_proj_dim", 32),
    (r".*embedding_size|hidden_size_global", 32),
    (r".*intermediate_size(_mlp)?|d_ff|.*ffn_dim|dff|dim_ff|n_inner|.*ffn_hidden_size|d_inner|feed_forward_size", 64),
    (r"mamba_d_head|mamba_headdim|mamba_head_dim", 16),
    (r"head_dim|d_kv|kv_channels|d_head|dim_head|attention_head_size|.*_head_dim|qk_head_dim|rotary_dim", 8),
    (r"attention_head_dim|head_size", 8),
    (r".*lora_rank|.*_rank", 8),
    (r"(num_|n_)?(routed_|local_|moe_num_)?experts", 4),
    (r"moe_num_experts|num_local_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group|.*n_groups|zero_expert_num", 1),
    (r"max_.*position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length", 256),
    (r".*initializer_range|init_std", 0.3),
    (r"query_pre_attn_scalar", 8),
    (r"attention_window", 4),
    (r"num_kv_shared_layers|first_k_dense_replace|n_mtp_layers|num_nextn_predict_layers", 0),
]  # fmt: skip
_RULES = [(re.compile(pattern), value) for pattern, value in _SIZES]
# Tried in turn: some classes want as many key heads as heads, or more layers until all kinds of them are there.
_SHAPES = [
    {"layers": layers, "key_heads": key_heads, "dtype": dtype, "text_only": text_only}
    for text_only in (False, True)
    for layers in (2, 4, 8)
    for key_heads in (2, 4)
    for dtype in (torch.float64, torch.float32)
]


class NotBuilt(Exception):
    """transformers cannot build or run the class in any small size; the text is its own reason for the first."""


def build(kind: str, encoder_decoder: bool, seed: int, **overrides: Any) -> torch.nn.Module:
    """A model in float64, or in float32 where the class cannot run in that. `overrides` go into the text configuration.

    Raises: NotBuilt.
    """
    reasons: list[str] = []
    composed = CONFIG_MAPPING[kind].sub_configs and not encoder_decoder
    for shape in _SHAPES:
        if shape["text_only"] and not composed:
            break
        if shape["dtype"] == torch.float32 and not re.search("Double|double|float", reasons[-1]):
            continue
        try:
            model = _make(kind, encoder_decoder, seed, shape, overrides)
            _run(model)
            return model
        except Exception as error:  # whatever a class raises for sizes that it was never meant to have
            reasons.append(_line(error))
    raise NotBuilt(reasons[0])


def _make(kind: str, encoder_decoder: bool, seed: int, shape: dict[str, Any], overrides: dict[str, Any]):
    config = CONFIG_MAPPING[kind]()
    if shape["text_only"] and not encoder_decoder:
        config = config.get_text_config(decoder=True)
    config = _shrunk(config, shape, overrides)
    config.pad_token_id, config.eos_token_id = 0, 2
    if encoder_decoder:
        config.decoder_start_token_id = 0
    elif hasattr(config, "is_decoder"):
        config.is_decoder = True
    maker = getattr(transformers, CLASSES[kind, encoder_decoder])
    with torch.device("meta"):
        weights = sum(p.numel() for p in maker(config).parameters())
    if weights > MOST_WEIGHTS:
        raise ValueError(f"{weights:,} weights")
    torch.manual_seed(seed)
    model = maker(config).eval().to(shape["dtype"])
    model.set_experts_implementation("eager")  # the others know no float64
    return model


def _run(model: torch.nn.Module) -> None:
    ids = torch.tensor([[0, 0, 8, 9, 10], [11, 12, 13, 14, 15]])
    ids = ids.flip(1) if model.config.is_encoder_decoder else ids
    model.generate(input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=3)


def _shrunk(config: PreTrainedConfig, shape: dict[str, Any], overrides: dict[str, Any]) -> PreTrainedConfig:
    values = {}
    deep = next(
        (vars(config)[n] for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if n in vars(config)), 0
    )
    for name, value in vars(config).items():
        if name.startswith("_") or name in ("transformers_version", "architectures", "model_type"):
            continue
        if isinstance(value, PreTrainedConfig):
            values[name] = _shrunk(value, shape, overrides).to_dict()
        elif isinstance(value, (list, tuple)) and len(value) == deep and _rule(name) is not None:  # one for each layer
            values[name] = [_small(name, item, shape) for item in value[-shape["layers"] :]]
        elif (size := _small(name, value, shape)) is not None:
            values[name] = size
    if "vocab_size" in values:
        values |= overrides
    return type(config)(**values)


def _small(name: str, value: Any, shape: dict[str, Any]) -> Any:
    """The value to give, or None to leave the setting out."""
    rule = _rule(name)
    if rule == "as it is":
        return value
    if rule == "token":
        return value if isinstance(value, int) and value < VOCABULARY else None
    size = shape.get(rule, rule) if isinstance(rule, str) else rule
    counted = isinstance(value, (int, float)) and not isinstance(value, bool) and value
    return size if size is None or counted or name in ("head_dim", "num_key_value_heads") else value


def _rule(name: str) -> Any:
    return next((size for pattern, size in _RULES if pattern.fullmatch(name)), "as it is")


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
