"""What this project knows of each family of models, by transformers' `model_type`: one table, one row a family.

It stands at the top, beside `errors`, because recipe, generation and models all read it: it is below each of them and
imports nothing. Read it with `of(...)` at the moment of use; keep no copies, so that a row that is added counts everywhere.

A family without a row loads where transformers can load it: its configuration tells the head, decoding is left to
`generate`, and LoRA needs `lora.target_modules` written out. To add a family, write its row, a recipe and a toy
(`tests/generation_toys.py`); `tests/test_families.py` holds each row against transformers' own classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

DROPOUTS = (  # of hidden states, attention and activations under every family's names; classifier heads are left out
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "dropout_rate",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
)


@dataclass(frozen=True)
class Family:
    """Facts of one family; the defaults are what holds for a family without a row."""

    kind: str | None = None  # "seq2seq" or "causal"; None: only the configuration can tell
    lora_targets: tuple[str, ...] = ()  # linears that `lora.target_modules: auto` adapts, where the model has them
    dropouts: tuple[str, ...] = DROPOUTS  # keys of the configuration that `model.dropout` sets
    depths: tuple[str, ...] = ("num_hidden_layers",)  # keys that say how deep the model is, one per stack of layers
    fits_fp16: bool = True  # False: activations exceed 65,504
    starts_with_pad: bool = False  # whether a decoder trained from scratch starts with the pad or the end token
    verified: bool = False  # own decoding was held against `generate` (tests/generation/test_search.py)
    capturable: bool = False  # a decoding step asks nothing of the device, so that a CUDA graph can hold it


_BART = Family(
    kind="seq2seq",
    lora_targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    dropouts=("dropout", "attention_dropout", "activation_dropout"),
    depths=("encoder_layers", "decoder_layers"),
)
_T5 = Family(
    kind="seq2seq",
    lora_targets=("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"),
    dropouts=("dropout_rate",),
    depths=("num_layers", "num_decoder_layers"),
    fits_fp16=False,
    starts_with_pad=True,
)
_LLAMA = Family(
    kind="causal",
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    dropouts=("attention_dropout",),
)
_NEOX_TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_PHI3_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_OWN = {"verified": True, "capturable": True}  # decoded by our own search, on a GPU in CUDA graphs

FAMILIES: dict[str, Family] = {
    "bart": replace(_BART, **_OWN),
    "blenderbot": _BART,
    "led": _BART,
    "m2m_100": replace(_BART, verified=True),  # its position table is grown by the host
    "marian": replace(_BART, **_OWN),
    "mbart": replace(_BART, **_OWN),
    "pegasus": replace(_BART, **_OWN),
    "longt5": _T5,
    "mt5": replace(_T5, **_OWN),
    "t5": replace(_T5, **_OWN),
    "umt5": replace(_T5, **_OWN),
    "exaone4": replace(_LLAMA, **_OWN),
    "gemma": replace(_LLAMA, **_OWN),
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": Family("causal", ("c_attn", "c_proj", "c_fc"), ("resid_pdrop", "embd_pdrop", "attn_pdrop"), **_OWN),
    "gpt_neox": Family("causal", _NEOX_TARGETS, ("attention_dropout", "hidden_dropout"), **_OWN),
    "llama": replace(_LLAMA, **_OWN),
    "mistral": replace(_LLAMA, **_OWN),
    "olmo2": replace(_LLAMA, **_OWN),
    "phi3": Family("causal", _PHI3_TARGETS, ("attention_dropout", "resid_pdrop", "embd_pdrop"), **_OWN),
    "qwen2": replace(_LLAMA, **_OWN),
    "qwen3": replace(_LLAMA, **_OWN),
}
_UNKNOWN = Family()


def of(model_type: str | None) -> Family:
    """The family's row, or what holds for a family without one."""
    return FAMILIES.get(model_type, _UNKNOWN) if isinstance(model_type, str) else _UNKNOWN
