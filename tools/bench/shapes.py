"""The exact shapes of real models, and toys of the same kind that show that a benchmark runs."""

from __future__ import annotations

from typing import Any

_LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256, "rope_theta": 5e5}
_QWEN3 = {"model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "rope_theta": 1e6}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-3b": _LLAMA
    | {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "qwen3-4b": _QWEN3
    | {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": _QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
SHAPES["kobart"] = {
    "model_type": "bart",
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
    "max_position_embeddings": 1026,
    "vocab_size": 30_000,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 3,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 997,
}
_TINY |= {"num_key_value_heads": 2, "head_dim": 16}
_TINY_BART = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}


def values_of(name: str, tiny: bool = False) -> dict[str, Any]:
    """A configuration as `AutoConfig.for_model` takes it, with `model_type`; `tiny`: a toy of the same kind."""
    values = SHAPES[name]
    return values | (_TINY_BART if values["model_type"] == "bart" else _TINY) if tiny else dict(values)
