"""One example to token ids and labels, for both families: prompts, truncation, the supervised span, and decoding back."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from engine.data.collate import IGNORE_INDEX
from engine.data.prompts import (
    PLAIN_ANSWER_CUE,
    PromptSettings,
    chat_messages,
    clean_summary,
    instruction_variants,
    normalise,
    source_text,
    split_turns,
)
from engine.data.rows import Example
from engine.errors import EngineError
from engine.runtime.faults import blaming

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAFE = "nothing was trained"
_MOST_WRITTEN = 1_000_000  # characters that a chat template may put around a dialogue
_ROWS_PER_CALL = 512  # rows given to the tokenizer at once


@dataclass(slots=True)
class Feature:
    """One tokenised example."""

    input_ids: list[int]  # encoder input, or a causal LM's prompt (and answer, where there are labels)
    labels: list[int] | None  # target with its end token, or aligned with input_ids; None for prediction
    index: int  # position in the list of examples
    source_tokens: int = 0  # before truncation
    target_tokens: int = 0  # before truncation, with the end token

    @property
    def parts(self) -> tuple[int, ...]:
        """Tokens that the model computes, by what is padded apart: source and target, or a causal LM's one row."""
        aligned = self.labels is None or self.labels[:1] == [IGNORE_INDEX]  # a causal LM's labels begin with its prompt
        return (len(self.input_ids),) if aligned else (len(self.input_ids), len(self.labels))

    @property
    def length(self) -> int:
        """Tokens that the model computes: source and target."""
        return sum(self.parts)


@dataclass(frozen=True, slots=True)
class _Row:
    """What is to be tokenised: one example under one instruction. Texts are normalised and hold no special token."""

    example: Example
    index: int
    dialogue: str
    topic: str | None
    instruction: str | None


@dataclass(slots=True)
class _Prompt:
    ids: list[int]
    text: str  # what `ids` encode, without the special tokens around them
    dialogue: str  # what is left of it
    tokens: int  # before truncation


@dataclass(frozen=True)
class TextEncoder:
    """Examples to features and token ids to text, for one tokenizer, family and prompt.

    Over-long sources are shortened inside the dialogue; prefix, template and instruction stay whole. Plain sources of
    encoder-decoders lose their end, token by token; all others their oldest turns, whole turns, and only where a single
    turn is too long that turn's beginning. Over-long targets lose their last tokens before the end token; the length
    report counts them.

    Args:
        family: "seq2seq" or "causal".
        max_source_length: most source tokens with special tokens; for causal LMs of the whole prompt.
        max_target_length: most target tokens with the end token.
    """

    tokenizer: PreTrainedTokenizerBase
    family: str
    settings: PromptSettings
    max_source_length: int
    max_target_length: int

    # What others call

    def training_feature(self, example: Example, index: int, instruction: str | None = None) -> Feature:
        """Source and supervised target of one example. Raises: EngineError E3.9 where nothing would be supervised."""
        return self.training_features([(example, index, instruction)])[0]

    def prompt_feature(self, example: Example, index: int) -> Feature:
        """What generation starts from: the same source as in training, no labels."""
        (prompt,) = self._prompts([self._row(example, index, None)])
        return Feature(prompt.ids, None, index, prompt.tokens)

    def training_features(self, rows: Sequence[tuple[Example, int, str | None]]) -> list[Feature]:
        """As `training_feature` for (example, index, instruction), tokenised together."""
        prepared = [self._row(*row) for row in rows]
        prompts = self._prompts(prepared)
        answers = [self._reference(row.example) for row in prepared]
        contents = self._answers(prepared, prompts, answers)
        features = []
        for row, prompt, content in zip(prepared, prompts, contents, strict=True):
            if not content:
                raise _unsupervised(row.example, "its summary has no token")
            target = content[: self.max_target_length - 1] + [self.end_token_id]
            input_ids, labels = prompt.ids, target
            if self.family == "causal":
                input_ids, labels = prompt.ids + target, [IGNORE_INDEX] * len(prompt.ids) + target
            features.append(Feature(input_ids, labels, row.index, prompt.tokens, len(content) + 1))
        return features

    def prompt_text(self, dialogue: str) -> str:
        """The prompt around a dialogue, as text and in full length."""
        return self._render(_Row(Example("", dialogue, (), None, 0), 0, dialogue, None, None), dialogue)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Generated ids to a clean summary: special tokens left out, placeholders such as `#Person1#` kept."""
        ids = [int(token) for token in token_ids if token >= 0]
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return clean_summary(text)

    @cached_property
    def end_token_id(self) -> int:
        """The last supervised token: of the chat template's end of turn, else the tokenizer's end token."""
        if self.family != "causal" or self.settings.style != "chat":
            return self.tokenizer.eos_token_id
        answer = "요약"
        row = _Row(Example("", "", (), None, 0), 0, "대화", None, None)
        rest = self._encode([self._answer_text(row, self._render(row, row.dialogue), row.dialogue, answer)])[0]
        return next((token for token in rest if token in self._special_ids), self.tokenizer.eos_token_id)

    def facts(self) -> list[Any]:
        """What decides features beside the row and the tokenizer's file, for a cache's key: values for JSON.

        The rendered prompt is among them, as a chat template may print today's date.
        """
        around = [*self._frame, self.end_token_id, self._special_texts.pattern, type(self.tokenizer).__name__]
        limits = [self.family, self.max_source_length, self.max_target_length]
        return [*around, *limits, self.settings.to_dict(), self.prompt_text("대화")]

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a generated summary: what training supervised last, and the tokenizer's end token."""
        return tuple(dict.fromkeys((self.end_token_id, self.tokenizer.eos_token_id)))

    # Source

    def _row(self, example: Example, index: int, instruction: str | None) -> _Row:
        dialogue = self._plain(example.dialogue)
        return _Row(example, index, dialogue, self._plain(example.topic) or None, instruction)

    def _plain(self, text: str | None) -> str:
        """Normalised, and without special tokens: a dialogue that says `</s>` must not end the source."""
        text = normalise(text or "").strip()
        return self._special_texts.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder
        return frozenset(i for i, token in added.items() if token.special) | frozenset(self.tokenizer.all_special_ids)

    @cached_property
    def _special_texts(self) -> re.Pattern[str]:
        tokens = [str(self.tokenizer.convert_ids_to_tokens(token)) for token in self._special_ids]
        marked = sorted((t for t in tokens if len(t) > 2 and t[0] in "<[" and t[-1] in ">]"), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, marked)) or r"(?!)")

    def _render(self, row: _Row, dialogue: str) -> str:
        """The prompt as text."""
        if self.settings.style == "chat":
            return self._chat(chat_messages(dialogue, self.settings, row.topic, row.instruction), generate=True)
        text = source_text(dialogue, self.settings, row.topic, row.instruction)
        return text + PLAIN_ANSWER_CUE if self.family == "causal" and self.settings.style == "plain" else text

    def _chat(self, messages: list[dict[str, str]], *, generate: bool) -> str:
        if not self.tokenizer.chat_template:
            raise EngineError(
                "E2.70", "the tokenizer has no chat template", "prompt.style", "use prompt.style=instruction"
            )
        where = self.tokenizer.name_or_path
        with blaming("E4.18", "the chat template cannot be used", where, "mend it, or set prompt.style=instruction"):
            text = self._rendered(messages, generate)
            if len(text) > _MOST_WRITTEN + 10 * sum(len(message["content"]) for message in messages):
                raise ValueError(f"it makes {len(text):,} characters of one dialogue")
        return text

    def _rendered(self, messages: list[dict[str, str]], generate: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generate,
                date_string=self.settings.date_string,
                enable_thinking=self.settings.enable_thinking,
            )
        except Exception as error:
            if type(error).__name__ != "TemplateError":  # of the template's own words; jinja's errors are subclasses
                raise
            raise EngineError(
                "E2.71",
                f"the chat template refuses the messages: {error}",
                "prompt.style",
                "templates without a system role need prompt.system=null",
            ) from error

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids without special tokens around them, but with those that a chat template wrote."""
        rows = self.tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        pool = self._pool
        return [[pool[token] for token in row] for row in rows]

    @cached_property
    def _pool(self) -> list[int]:
        """One object per id: 60,000 rows of fresh integers would take four times the memory."""
        return list(range(max(len(self.tokenizer), self.tokenizer.vocab_size)))

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """Special tokens before and after a source, as the tokenizer itself puts them; a prompt never ends in one."""
        if self.family == "causal" and self.settings.style == "chat":
            return [], []  # the template writes its own
        probe = "가"
        inner, framed = self._encode([probe])[0], self.tokenizer(probe, verbose=False)["input_ids"]
        for start in range(len(framed) - len(inner) + 1):
            if framed[start : start + len(inner)] == inner:
                return framed[:start], [] if self.family == "causal" else framed[start + len(inner) :]
        return [], []

    def _prompts(self, rows: list[_Row]) -> list[_Prompt]:
        before, after = self._frame
        budget = self.max_source_length - len(before) - len(after)
        texts = [self._render(row, row.dialogue) for row in rows]
        prompts = []
        for row, text, ids in zip(rows, texts, self._encode(texts), strict=True):
            if not ids or not row.dialogue:
                raise _unsupervised(row.example, "its dialogue has no token")
            tokens, dialogue = len(before) + len(ids) + len(after), row.dialogue
            if len(ids) > budget:
                ids, dialogue = self._shorten(row, ids, budget)
                text = self._render(row, dialogue)
            prompts.append(_Prompt(before + ids + after, text, dialogue, tokens))
        return prompts

    def _shorten(self, row: _Row, ids: list[int], budget: int) -> tuple[list[int], str]:
        """Ids of at most `budget` tokens, and the part of the dialogue that they hold.

        Cutting the ids would cut the template: the model would read half an instruction, or no cue to answer. So text is
        taken out of the dialogue and the prompt is rendered anew. How many tokens that saves is known only afterwards
        (tokens join across line ends), hence the search by bisection with the tokenizer as the measure. The oldest turns
        go first: a conversation's outcome is at its end.
        """
        template = len(self._encode([self._render(row, "")])[0])
        if template >= budget:
            raise self._no_room(row, template)
        if self.family == "seq2seq" and self.settings.style == "plain":
            return ids[:budget], row.dialogue  # no template to protect; transformers' own truncation, to the token
        turns = split_turns(row.dialogue)

        def fits(dialogue: str) -> bool:
            return len(self._encode([self._render(row, dialogue)])[0]) <= budget

        def starting(first: int) -> str:
            return "\n".join(turns[first:]).strip()

        first = _first(len(turns), lambda first: fits(starting(first)))
        dialogue = starting(first) if first < len(turns) else _tail(turns[-1], fits)
        if not dialogue:
            raise self._no_room(row, template)
        return self._encode([self._render(row, dialogue)])[0], dialogue

    def _no_room(self, row: _Row, template: int) -> EngineError:
        around = sum(map(len, self._frame))
        return EngineError(
            "E2.72",
            f"the prompt without any dialogue has {template + around} tokens: there is no room for the dialogue",
            f"data.max_source_length {self.max_source_length}; {row.example.place}",
            f"set data.max_source_length to {template + around + 64} or more",
        )

    # Target

    def _reference(self, example: Example) -> str:
        reference = self._plain(example.references[0]) if example.references else ""
        if not reference:
            raise _unsupervised(example, "it has no summary")
        return reference

    def _answers(self, rows: list[_Row], prompts: list[_Prompt], answers: list[str]) -> list[list[int]]:
        """Token ids of the answers without their end token, untruncated."""
        if self.family == "seq2seq":
            return self._encode(answers)
        texts = [self._answer_text(r, p.text, p.dialogue, a) for r, p, a in zip(rows, prompts, answers, strict=True)]
        whole = self._encode([prompt.text + text for prompt, text in zip(prompts, texts, strict=True)])
        contents = []
        for prompt, text, ids in zip(prompts, texts, whole, strict=True):
            before = len(self._frame[0])
            length = len(prompt.ids) - before
            # Where tokens reach across the border the answer is encoded by itself: prediction sees the prompt alone.
            rest = ids[length:] if ids[:length] == prompt.ids[before:] else self._encode([text])[0]
            chat = self.settings.style == "chat"
            contents.append(rest[: rest.index(self.end_token_id)] if chat and self.end_token_id in rest else rest)
        return contents

    def _answer_text(self, row: _Row, prompt: str, dialogue: str, answer: str) -> str:
        """What follows the prompt: the answer, and for chat what the template puts around it."""
        if self.settings.style != "chat":
            return answer
        messages = chat_messages(dialogue, self.settings, row.topic, row.instruction)
        whole = self._chat([*messages, {"role": "assistant", "content": answer}], generate=False)
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        # The template writes an answered conversation in another way than one that waits for its answer.
        return whole[whole.rindex(answer) :] if answer in whole else answer


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """The smallest i in [0, count) for which `holds(i)`, by bisection, or `count`; `holds` is (nearly) monotone."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _tail(turn: str, fits: Callable[[str], bool]) -> str:
    """The longest end of a turn that fits, from the next word on where that is near."""
    start = _first(len(turn), lambda start: fits(turn[start:]))
    space = turn.find(" ", start, start + 20)
    word = turn[space + 1 :]
    return word if space >= 0 and word and fits(word) else turn[start:]


def _unsupervised(example: Example, reason: str) -> EngineError:
    return EngineError("E3.9", f"the row cannot be used: {reason}", example.place, "correct or drop the row")


def encode_all(encoder: TextEncoder, examples: Sequence[Example], *, augment: bool = False) -> list[Feature]:
    """Training features of all examples, in order; with `augment` five of each, one per instruction.

    Raises:
        EngineError: as `training_feature`.
    """
    instructions = instruction_variants(encoder.settings) if augment else (None,)
    rows = [(example, index, wording) for index, example in enumerate(examples) for wording in instructions]
    parts = (rows[start : start + _ROWS_PER_CALL] for start in range(0, len(rows), _ROWS_PER_CALL))
    return [feature for part in parts for feature in encoder.training_features(part)]


def length_report(features: Sequence[Feature], encoder: TextEncoder) -> dict[str, Any]:
    """Token lengths before truncation, and the shares that were truncated.

    Returns:
        `source` and `target` (None without labels), each with median, p90, p99, max, limit, truncated (a share);
        `unknown`, the share of tokens that stand for text outside the vocabulary; and `text`, a line for each of them.
    """
    source = _lengths([feature.source_tokens for feature in features], encoder.max_source_length)
    targets = [feature.target_tokens for feature in features if feature.labels is not None]
    target = _lengths(targets, encoder.max_target_length) if targets else None
    plain = encoder.family == "seq2seq" and encoder.settings.style == "plain"
    lines = [_line("source", source, "data.max_source_length", "their end" if plain else "their oldest turns")]
    if target:
        lines.append(_line("target", target, "data.max_target_length", "their last words"))
    unknown = _unknown_share(features, encoder.tokenizer)
    if unknown:
        lines.append(
            f"{100 * unknown:.2g} % of all tokens are unknown to the tokenizer: the model cannot see that text"
        )
    text = "\n".join(lines)
    return {"rows": len(features), "source": source, "target": target, "unknown": unknown, "text": text}


def _unknown_share(features: Sequence[Feature], tokenizer: PreTrainedTokenizerBase) -> float:
    """0 also where another special token stands in for the unknown one, as in byte-level vocabularies."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return 0.0
    found = total = 0
    for feature in features:
        for row in (feature.input_ids, feature.labels or []):
            found, total = found + row.count(unknown), total + len(row)
    return found / max(1, total)


def _lengths(lengths: list[int], limit: int) -> dict[str, Any]:
    ordered = sorted(lengths) or [0]

    def at(share: float) -> int:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    truncated = sum(length > limit for length in lengths) / max(1, len(lengths))
    return {
        "median": at(0.5),
        "p90": at(0.9),
        "p99": at(0.99),
        "max": ordered[-1],
        "limit": limit,
        "truncated": truncated,
    }


def _line(name: str, lengths: dict[str, Any], key: str, lost: str) -> str:
    text = "{name} tokens: median {median}, 90 % up to {p90}, 99 % up to {p99}, longest {max}".format(
        name=name, **lengths
    )
    if not lengths["truncated"]:
        return f"{text}; none is cut"
    return f"{text}; {100 * lengths['truncated']:.1f} % are longer than {key}={lengths['limit']} and lose {lost}"
