"""Tiny random models for the generation tests. Weights are drawn wide (0.3-0.5), so that scores are well apart."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from engine.generation import fallback
from engine.generation.search import Decoded, Search
from engine.generation.settings import GenerationSettings

VOCABULARY = 97
_CAUSAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "pad_token_id": 3,
    "forced_eos_token_id": 1,
    "init_std": 0.4,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "initializer_factor": 1.0,  # T5 does not scale its attention: wider weights blow rounding up
}
_QWEN = _CAUSAL | {"bos_token_id": 4, "eos_token_id": 2, "pad_token_id": 0}
_PLAIN = {name: value for name, value in _QWEN.items() if name != "head_dim"}
_CONFIGS = {
    "bart": _BART,  # start == end, as in KoBART
    "mbart": _BART,
    "pegasus": _BART,
    "marian": _BART,
    "m2m_100": _BART,
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "llama": _CAUSAL | {"bos_token_id": 4, "eos_token_id": [1, 2, 5], "pad_token_id": 1},  # as in Llama 3
    "qwen3": _QWEN,
    "qwen2": _PLAIN,
    "mistral": _QWEN | {"sliding_window": None},
    "gemma": _QWEN,
    "phi3": _PLAIN,
    "olmo2": _PLAIN,
    "gpt2": _PLAIN,
    "gpt_neox": _PLAIN,
    "exaone4": _PLAIN | {"layer_types": ["full_attention"] * 2},
}
FAMILIES = ("bart", "t5", "llama", "qwen3")
OTHERS = tuple(family for family in _CONFIGS if family not in FAMILIES)


def each(families=FAMILIES, *, quick=("bart", "llama")) -> list:
    """Cases of a test that says the same of every family: at a desk one encoder-decoder and one causal model do."""
    return [pytest.param(family, marks=() if family in quick else pytest.mark.slow) for family in families]


@pytest.fixture(autouse=True)
def one_thread():
    """Toy layers are too small to share among threads, which would only wait. Works where it is imported."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(family: str, seed: int = 0, **overrides):
    """A fresh model in evaluation mode. `overrides` change its config."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **_CONFIGS[family] | overrides)
    maker = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return maker.from_config(config).eval()


@lru_cache
def shared(family: str, seed: int = 0):
    """`build(family, seed)`, made once: tests that change nothing share it."""
    return build(family, seed)


def batch(model, lengths=(9, 6, 4, 8), seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ids `[B, S]` and mask, padded on the family's side; no special token among the real ones."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    pad = model.generation_config.pad_token_id or 0
    ids = torch.randint(6, VOCABULARY, (len(lengths), width), generator=generator)
    places = torch.arange(width)
    real = torch.stack([places < n if model.config.is_encoder_decoder else places >= width - n for n in lengths])
    return {"input_ids": torch.where(real, ids, pad), "attention_mask": real.long()}


def resolved(model, **values) -> GenerationSettings:
    return GenerationSettings.resolve(
        values,
        model_generation_config=model.generation_config,
        is_encoder_decoder=model.config.is_encoder_decoder,
    )


def reference(model, **arguments):
    """transformers' own result."""
    return model.generate(**arguments, return_dict_in_generate=True, output_scores=True)


def decode(model, *, scope: str = "all", compaction: bool = True, cuda_graphs: bool = False, **arguments) -> Decoded:
    """Ours, through the same door."""
    search = Search(scope, arguments.pop("vocabulary_mask", None), compaction=compaction, cuda_graphs=cuda_graphs)
    return fallback.decode(model, arguments | {"output_scores": True}, search)


def assert_equal(ours: Decoded, theirs, tolerance: float = 1e-5) -> None:
    """Same tensors, fill values included; scores to `tolerance`."""
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    scores = getattr(theirs, "sequences_scores", None)
    if scores is not None:
        torch.testing.assert_close(ours.sequences_scores, scores, rtol=tolerance, atol=tolerance, equal_nan=True)
        assert ours.beam_indices.dtype == theirs.beam_indices.dtype
        assert ours.beam_indices.tolist() == theirs.beam_indices.tolist()
