"""Tiny models and tokenizers with random weights for tests: built in milliseconds, the same in every process.

folder = tiny.save("llama", tmp_path)                     # a Hugging Face model folder
model, tokenizer = tiny.model("bart"), tiny.tokenizer("bart")
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from engine.data.collate import IGNORE_INDEX

FAMILIES = ("bart", "t5", "llama", "qwen3")
CAUSAL = ("llama", "qwen3")
ADDED = ["#Person1#", "#Person2#", "#PhoneNumber#"]
HIDDEN, HEADS, LAYERS, FEED_FORWARD = 32, 4, 2, 64

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "[{{ message['role'] }}]\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)

TEXTS = [
    "#Person1#: 안녕하세요, 오늘 회의는 몇 시에 시작하나요?\n#Person2#: 오후 세 시에 시작합니다. 자료를 준비해 주세요.",
    "#Person1#: 주말에 뭐 할 거예요?\n#Person2#: 친구와 함께 산에 갈 생각이에요. 날씨가 좋다고 하네요.",
    "#Person1#: 예약을 바꾸고 싶은데요.\n#Person2#: 네, 성함과 전화번호 #PhoneNumber#를 확인해 드릴게요.",
    "#Person1#: 이 책을 빌릴 수 있을까요?\n#Person2#: 네, 다음 주 금요일까지 돌려주시면 됩니다.",
    "#Person1#: 커피 한 잔 주세요.\n#Person2#: 따뜻한 것으로 드릴까요, 차가운 것으로 드릴까요?",
    "#Person1#은 #Person2#에게 회의 시간을 묻고, 오후 세 시에 시작한다는 답을 듣는다.",
    "#Person2#는 주말에 친구와 산에 갈 생각이다. #Person1#에게 날씨가 좋다고 말한다.",
    "#Person1#은 예약을 바꾸려고 하고 #Person2#는 전화번호를 확인한다.",
]


@lru_cache
def _trained(kind: str, causal: bool) -> Any:
    from engine.data.vocabulary import train_tokenizer

    return train_tokenizer(TEXTS, vocabulary_size=400, kind=kind, added_tokens=ADDED, causal=causal)


def tokenizer(family: str, *, kind: str = "unigram") -> Any:
    """A small tokenizer trained on TEXTS (about 400 tokens); causal families carry a chat template."""
    import copy

    made = copy.deepcopy(_trained(kind, family in CAUSAL))
    if family in CAUSAL:
        made.chat_template = CHAT_TEMPLATE
    return made


def config_values(family: str, vocabulary: int = 400, **changes: Any) -> dict[str, Any]:
    """A transformers configuration as recipes write it, with `model_type`."""
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if family == "bart":
        values = {
            "d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS, "encoder_ffn_dim": FEED_FORWARD, "decoder_ffn_dim": FEED_FORWARD,
            "max_position_embeddings": 256, "decoder_start_token_id": 3, "forced_eos_token_id": None,
        }  # fmt: skip
    elif family == "t5":
        values = {
            "d_model": HIDDEN, "d_ff": FEED_FORWARD, "d_kv": HIDDEN // HEADS, "num_layers": LAYERS, "num_heads": HEADS,
            "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        }  # fmt: skip
    else:
        values = {
            "hidden_size": HIDDEN, "intermediate_size": FEED_FORWARD, "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": HIDDEN // HEADS,
            "max_position_embeddings": 256,
            "tie_word_embeddings": family == "qwen3",
        }  # fmt: skip
    return {"model_type": family, "vocab_size": vocabulary} | ids | values | changes


def model(family: str, vocabulary: int = 400, *, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A model with random float32 weights in eval mode; the caller's random stream is left alone."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    values = config_values(family, vocabulary, **changes)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    auto = AutoModelForCausalLM if family in CAUSAL else AutoModelForSeq2SeqLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config).eval()


def save(family: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder with a tiny model and its tokenizer."""
    made = tokenizer(family)
    model(family, len(made), seed=seed, **changes).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int = 8) -> Path:
    """A JSONL file with `count` dialogues and summaries."""
    rows = [
        {"fname": f"row_{i}", "dialogue": TEXTS[i % 5] + f"\n#Person1#: {i}번입니다.", "summary": TEXTS[5 + i % 3]}
        for i in range(count)
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def causal_batch(rows: int = 3, length: int = 9, vocabulary: int = 400) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, vocabulary, (rows, length))
    labels = ids.clone()
    labels[:, : length // 2] = IGNORE_INDEX  # prompts
    labels[-1, -2:] = IGNORE_INDEX  # padding of the last row
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def seq2seq_batch(rows: int = 3, source: int = 9, target: int = 6, vocabulary: int = 400) -> dict[str, torch.Tensor]:
    labels = torch.randint(5, vocabulary, (rows, target))
    labels[-1, -2:] = IGNORE_INDEX
    decoder = torch.cat([torch.full((rows, 1), 3), labels[:, :-1].clamp(min=0)], dim=1)
    ids = torch.randint(5, vocabulary, (rows, source))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "decoder_input_ids": decoder}


def batch_for(family: str) -> dict[str, torch.Tensor]:
    return causal_batch() if family in CAUSAL else seq2seq_batch()


def bert(folder: Path | None = None) -> tuple[torch.nn.Module, Any]:
    """A BERT encoder of two layers and a tokenizer that frames texts with [CLS] and [SEP]; saved where a folder is given."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = "[PAD] [UNK] [CLS] [SEP]".split() + sorted({letter for text in TEXTS for letter in text if letter.strip()})
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    letters = pre_tokenizers.Split(Regex("."), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), letters])
    frame = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=frame)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **names)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": FEED_FORWARD, "max_position_embeddings": 128}
    config = BertConfig(
        vocab_size=len(words), num_hidden_layers=LAYERS, num_attention_heads=HEADS, pad_token_id=0, **sizes
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = BertModel(config).eval()
    if folder is not None:
        encoder.save_pretrained(folder)
        made.save_pretrained(folder)
    return encoder, made
