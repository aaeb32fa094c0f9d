"""Token ids from the cache are those that the encoder makes, or they are not used."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import pytest
import tiny
from encoders import encoder, example, settings, tiny_llama

from engine import prompt_template
from engine.data import feature_cache
from engine.data.collate import collate_causal, collate_seq2seq
from engine.data.encode import encode_all
from engine.data.feature_cache import FeatureCache
from engine.data.rows import Example

CASES = [("bart", "plain"), ("bart", "instruction"), ("t5", "plain"), ("llama", "plain"), ("llama", "instruction")]
CASES += [("llama", "chat"), ("qwen3", "chat")]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Never the cache of the person who runs the tests; three rows count as many."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(feature_cache, "_FEWEST_ROWS", 3)
    return tmp_path / "hf" / "ko-dialogue-engine" / "features"


def rows(count: int = 8) -> list[Example]:
    """Of different lengths, some truncated, one with a topic."""
    texts = ["\n".join([tiny.TEXTS[i % 5]] * (1 + i % 4)) for i in range(count)]
    made = [Example(f"r{i}", text, (tiny.TEXTS[5 + i % 3],), None, i + 1) for i, text in enumerate(texts)]
    return [replace(made[0], topic="회의"), *made[1:]]


@pytest.fixture
def never(monkeypatch):
    """The encoder must not be asked for training features."""

    def asked(*arguments, **options):
        raise AssertionError("tokenised again")

    return lambda: monkeypatch.setattr(feature_cache.encode, "encode_all", asked)


def files(folder) -> list:
    return sorted(folder.glob("*/*")) if folder.exists() else []


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(("family", "style"), CASES)
def test_features_are_equal_the_second_time(family, style, mapped, never, monkeypatch):
    if mapped:
        monkeypatch.setattr(feature_cache, "_MAPPED_FROM", 1)
    limit = 90 if style == "plain" else 260
    made, examples = encoder(family, style, source=limit, target=20), rows()
    augment = style != "plain"
    wanted = encode_all(made, examples, augment=augment)
    prompts = [made.prompt_feature(row, index) for index, row in enumerate(examples)]
    first = FeatureCache(made, keep=True)
    assert list(first.training(examples, augment=augment)) == wanted and list(first.prompts(examples)) == prompts
    never()
    monkeypatch.setattr(type(made), "prompt_feature", None)
    again = FeatureCache(encoder(family, style, source=limit, target=20), keep=True)
    stored, stored_prompts = again.training(examples, augment=augment), again.prompts(examples)
    assert list(stored) == wanted and list(stored_prompts) == prompts
    assert stored[-1] == wanted[-1] and stored[1:3] == wanted[1:3] and len(stored) == len(wanted)
    with pytest.raises(IndexError):
        stored[len(wanted)]
    assert all(type(token) is int for token in stored[0].input_ids + stored[0].labels)
    collate, options = collate_causal, {"pad_token_id": 0}
    if family not in tiny.CAUSAL:
        collate, options = collate_seq2seq, options | {"decoder_start_token_id": 3}
    ours, theirs = collate(stored[:4], **options), collate(wanted[:4], **options)
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def other_tokenizer():
    return encoder("bart", tokenizer=tiny.tokenizer("bart", kind="bpe"))


def with_one_more_token():
    made = tiny.tokenizer("bart")
    made.add_tokens(["회의는"])
    return encoder("bart", tokenizer=made)


def with_template(text: str):
    made = tiny_llama("unigram")
    made.chat_template = text
    return encoder("llama", "chat", tokenizer=made)


CHANGED = {
    "source": lambda: encoder("bart", source=91),
    "target": lambda: encoder("bart", target=21),
    "prefix": lambda: replace(encoder("bart"), settings=settings("plain", prefix="요약: ")),
    "style": lambda: encoder("bart", "instruction"),
    "family": lambda: encoder("llama", "instruction"),
    "tokenizer": other_tokenizer,
    "token": with_one_more_token,
    "chat": lambda: encoder("llama", "chat"),
    "template": lambda: with_template("{{ bos_token }}" + tiny.CHAT_TEMPLATE),
    "system": lambda: replace(encoder("llama", "chat"), settings=settings("chat", system="짧게.")),
    "unused": lambda: encoder("bart"),
}


def test_whatever_decides_the_ids_names_another_file(folder):
    examples = rows()
    for name, make in CHANGED.items():
        before = len(files(folder))
        made = make()
        assert list(FeatureCache(made, keep=True).training(examples)) == encode_all(made, examples), name
        assert len(files(folder)) == before + 1, name
    made, before = encoder("bart"), len(files(folder))
    texts = [
        [replace(examples[0], dialogue=examples[0].dialogue + "."), *examples[1:]],
        [replace(examples[0], references=("요약",)), *examples[1:]],
        [replace(examples[0], topic=None), *examples[1:]],
        examples[::-1],
        examples[:-1],
    ]
    for number, changed in enumerate(texts, start=1):
        assert list(FeatureCache(made, keep=True).training(changed)) == encode_all(made, changed)
        assert len(files(folder)) == before + number


@pytest.mark.parametrize("room", [feature_cache.encode, feature_cache.prompts, prompt_template])
def test_the_code_that_encodes_is_part_of_the_name(folder, tmp_path, monkeypatch, room):
    for number in range(2):
        FeatureCache(encoder("bart"), keep=True).training(rows())
        assert len(files(folder)) == 1 + number
        changed = tmp_path / "changed.py"
        changed.write_text("another layout", encoding="utf-8")
        monkeypatch.setattr(room, "__file__", str(changed))


def test_a_template_with_todays_date_is_rendered_for_the_name(folder, monkeypatch):
    from transformers.utils import chat_template_utils

    template = "{{ strftime_now('%d') }}" + tiny.CHAT_TEMPLATE
    days = iter(("01", "02"))
    for number in range(2):
        day = next(days)

        class Today(chat_template_utils.datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return cls(2025, 1, int(day))

        monkeypatch.setattr(chat_template_utils, "datetime", Today)
        made = with_template(template)
        assert list(FeatureCache(made, keep=True).training(rows())) == encode_all(made, rows())
        assert len(files(folder)) == 1 + number


def damages(data: bytes) -> dict[str, bytes]:
    """Every kind of place in the file, flipped; and the file cut or grown."""
    places = [0, 20, 60, 80, 85, 100, len(data) // 2, len(data) - 1]
    flipped = {f"bit at {at}": data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :] for at in places}
    cut = {f"cut to {size}": data[:size] for size in (0, 1, 16, 48, 79, 80, 83, len(data) - 4, len(data) - 1)}
    return flipped | cut | {"grown": data + b"\0\0\0\0", "other": b"PK" + bytes(500)}


@pytest.mark.parametrize("mapped", [False, True])
def test_a_damaged_file_is_told_and_made_again(folder, mapped, caplog, monkeypatch):
    made, examples = encoder("bart"), rows()
    wanted = encode_all(made, examples)
    FeatureCache(made, keep=True).training(examples)
    (path,) = files(folder)
    good = path.read_bytes()
    for name, bad in damages(good).items():
        monkeypatch.setattr(feature_cache, "_MAPPED_FROM", 1 if mapped else 10**9)
        path.write_bytes(bad)
        caplog.clear()
        assert list(FeatureCache(made, keep=True).training(examples)) == wanted, name
        assert "tokenised again" in caplog.text, name
        assert path.read_bytes() == good, name


def test_a_file_of_other_rows_under_this_name_is_not_taken(folder, caplog):
    made = encoder("bart")
    FeatureCache(made, keep=True).training(rows(8))
    (first,) = files(folder)
    FeatureCache(made, keep=True).training(rows(9))
    second = next(path for path in files(folder) if path != first)
    second.write_bytes(first.read_bytes())  # whole, but not what its name says
    assert list(FeatureCache(made, keep=True).training(rows(9))) == encode_all(made, rows(9))
    assert "tokenised again" in caplog.text


def test_few_rows_and_switched_off_leave_nothing(folder):
    FeatureCache(encoder("bart"), keep=True).training(rows(2))
    FeatureCache(encoder("bart"), keep=False).training(rows())
    assert not folder.exists()


def test_a_tokenizer_with_code_of_its_own_is_not_trusted(folder):
    made = tiny.tokenizer("bart")
    own = encoder("bart", tokenizer=made)
    kind = type(made)
    made.__class__ = type(kind.__name__, (kind,), {"__module__": "transformers_modules.somebody"})
    assert list(FeatureCache(own, keep=True).training(rows())) == encode_all(own, rows())
    assert not folder.exists()


def test_a_cache_that_cannot_be_written_is_no_error(folder, monkeypatch, caplog):
    caplog.set_level("INFO")
    wanted = encode_all(encoder("bart"), rows())
    folder.parent.parent.mkdir()
    folder.parent.write_text("a file in the folder's place")
    assert list(FeatureCache(encoder("bart"), keep=True).training(rows())) == wanted
    assert "not kept" in caplog.text
    folder.parent.unlink()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache, "written_atomically", full)
    assert list(FeatureCache(encoder("bart"), keep=True).training(rows())) == wanted
    assert not files(folder)


def test_links_are_not_followed(folder, tmp_path, caplog):
    made = encoder("bart")
    FeatureCache(made, keep=True).training(rows())
    (path,) = files(folder)
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    kept = elsewhere.read_bytes()
    assert list(FeatureCache(made, keep=True).training(rows())) == encode_all(made, rows())
    assert not path.is_symlink() and elsewhere.read_bytes() == kept, "the link was replaced"
    path.unlink()
    path.parent.rmdir()
    (tmp_path / "folder").mkdir()
    path.parent.symlink_to(tmp_path / "folder")
    assert list(FeatureCache(made, keep=True).training(rows())) == encode_all(made, rows())
    assert not list((tmp_path / "folder").iterdir())


def test_many_at_once_tokenise_once(folder, monkeypatch):
    examples, calls, plain = rows(), [], feature_cache.encode.encode_all

    def counted(*arguments, **options):
        calls.append(1)
        return plain(*arguments, **options)

    monkeypatch.setattr(feature_cache.encode, "encode_all", counted)
    caches = [FeatureCache(encoder("bart"), keep=True) for _ in range(4)]
    found = []
    threads = [threading.Thread(target=lambda c=c: found.append(list(c.training(examples)))) for c in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and found == [plain(encoder("bart"), examples)] * 4
    assert [path.name for path in files(folder)] == ["features.bin"]


def test_the_longest_unused_goes_first(folder, monkeypatch):
    made = encoder("bart")
    for count in (4, 5, 6):
        FeatureCache(made, keep=True).training(rows(count))
    for age, path in enumerate(sorted(files(folder), key=lambda path: path.stat().st_size)):
        os.utime(path, (1000 + age, 1000 + age))
    small, middle, large = sorted(files(folder), key=lambda path: path.stat().st_size)
    FeatureCache(made, keep=True).training(rows(4))  # used: now it is the latest
    monkeypatch.setattr(feature_cache, "_MOST_BYTES", 2 * small.stat().st_size + large.stat().st_size)
    FeatureCache(made, keep=True).training(rows(3))
    assert small.exists() and large.exists() and not middle.parent.exists()


def test_refused_rows_are_refused_as_without(folder):
    from engine.errors import EngineError

    examples = [*rows(), example("대화", " ")]
    with pytest.raises(EngineError, match=r"E3\.9"):
        FeatureCache(encoder("bart"), keep=True).training(examples)
    assert not files(folder)
