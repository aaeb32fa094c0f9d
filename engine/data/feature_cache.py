"""Token ids of large files, kept from one run to the next and shared by the ranks of a run.

A file is named by a hash of all that decides what is in it: the rows, the tokenizer, the prompt, the limits and the code that
encodes. It is hashed again when it is opened, so that a damaged one is made anew and never used. Small files are read,
large ones mapped: then no rank holds a copy, and rows come from the disk when an update needs them.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import logging
import mmap
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine import prompt_template
from engine.data import encode, prompts
from engine.data.encode import Feature
from engine.data.rows import rows_fingerprint
from engine.runtime.atomic import remove_partials, without_links, written_atomically
from engine.runtime.lock import taking_turns
from engine.runtime.own_cache import cache_folder

if TYPE_CHECKING:
    from engine.data.encode import TextEncoder
    from engine.data.rows import Example

log = logging.getLogger("engine.data")

_NAME = "features.bin"
_MAGIC = b"ko-dialogue-1\n\0\0"  # then a sha256 of the rest: the key, and whole numbers of 4 bytes, lowest first
_DIGEST, _KEY, _NUMBERS = (slice(16, 48), slice(48, 80), slice(80, None))
_COLUMNS = 5  # of a row: index, source_tokens, target_tokens, number of input_ids, number of labels (-1: none)
_FEWEST_ROWS = 200  # fewer are tokenised in half a second
_MAPPED_FROM = 64 << 20  # bytes
_MOST_BYTES = 8 << 30  # of all files together; those that were not used for longest go first


class FeatureCache:
    """Features of examples as `encode` makes them, from the cache where it has them.

    Args:
        keep: False tokenises every time.
    """

    def __init__(self, encoder: TextEncoder, *, keep: bool) -> None:
        self.encoder = encoder
        # A tokenizer with code of its own may do what no hash of its files tells.
        known = type(encoder.tokenizer).__module__.startswith("transformers.")
        self._keep = keep and known
        self._facts: list[Any] | None = None

    def training(self, examples: Sequence[Example], *, augment: bool = False) -> Sequence[Feature]:
        """As `encode_all`."""
        kind = "augmented" if augment else "training"
        return self._get(kind, examples, lambda: encode.encode_all(self.encoder, examples, augment=augment))

    def prompts(self, examples: Sequence[Example]) -> Sequence[Feature]:
        """As `prompt_feature` of each."""
        encoder = self.encoder
        return self._get(
            "prompts", examples, lambda: [encoder.prompt_feature(row, index) for index, row in enumerate(examples)]
        )

    def _get(self, kind: str, examples: Sequence[Example], make: Callable[[], list[Feature]]) -> Sequence[Feature]:
        if not self._keep or len(examples) < _FEWEST_ROWS:
            return make()
        made: list[Feature] | None = None
        try:
            self._facts = self._facts or facts(self.encoder)
            key = hashlib.sha256(json.dumps([self._facts, kind, rows_fingerprint(examples)]).encode()).digest()
            path = cache_folder() / "features" / key.hex()[:32] / _NAME
            if (found := _opened(path, key)) is not None:
                return found
            path.parent.mkdir(parents=True, exist_ok=True)
            with taking_turns(path.parent):
                found = _opened(path, key)  # another rank or run may have made it meanwhile
                if found is None:
                    made = make()
                    _write(path, key, made)
                    found = _opened(path, key)
            _drop_oldest(path.parent.parent)
        except OSError as error:
            log.info("token ids are not kept for the next run: %s", error)
            found = None
        if found is None:
            return make() if made is None else made
        return found


class StoredFeatures(Sequence[Feature]):
    """Features whose token ids stay where they are stored until a row is asked for.

    Args:
        numbers: 4-byte integers (1 + 5 N + tokens): the number of rows N, five columns of each, all token ids in order.
    """

    def __init__(self, numbers: np.ndarray) -> None:
        tokens = 1 + _COLUMNS * int(numbers[0])
        self._table, self._tokens = numbers[1:tokens].reshape(-1, _COLUMNS), numbers[tokens:]
        self._ends = np.maximum(self._table[:, 3:], 0).sum(axis=1, dtype=np.int64).cumsum()

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[at] for at in range(*position.indices(len(self)))]
        index, source, target, ids, labels = self._table[position].tolist()
        end = int(self._ends[position])
        row = self._tokens[end - ids - max(0, labels) : end].tolist()
        return Feature(row[:ids], None if labels < 0 else row[ids:], index, source, target)


def facts(encoder: TextEncoder) -> list[Any]:
    """All that decides the features of a row but the row: values for JSON."""
    backend, template = encoder.tokenizer.backend_tokenizer, encoder.tokenizer.chat_template
    rooms = (encode, prompts, prompt_template)
    code = [hashlib.sha256(Path(room.__file__).read_bytes()).hexdigest() for room in rooms]
    versions = [importlib.metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")]
    rendered = encoder.facts()  # calls the tokenizer, whose settings of the last call are part of the next line
    tokenizer = hashlib.sha256(backend.to_str().encode()).hexdigest()
    return [code, versions, platform.python_version(), tokenizer, template, rendered]


def _opened(path: Path, key: bytes) -> StoredFeatures | None:
    """The features of a file; None where it is not there or not what was written, which is told."""
    try:
        if not path.is_file():
            return None
        with open(path, "rb", opener=without_links) as file:
            large = os.fstat(file.fileno()).st_size >= _MAPPED_FROM
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if large else file.read())
        whole = data[:16] == _MAGIC and data[_DIGEST] == hashlib.sha256(data[_KEY.start :]).digest()
        if not whole or data[_KEY] != key:
            raise ValueError("it is damaged")
    except (OSError, ValueError) as error:
        log.warning("token ids in %s cannot be used, so the rows are tokenised again: %s", path, error)
        return None
    with suppress(OSError):
        os.utime(path)  # the last use
    return StoredFeatures(np.frombuffer(data[_NUMBERS], dtype="<i4"))


def _write(path: Path, key: bytes, features: Sequence[Feature]) -> None:
    if path.parent.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path.parent))
    counts = [(len(row.input_ids), -1 if row.labels is None else len(row.labels)) for row in features]
    table = [
        (row.index, row.source_tokens, row.target_tokens, *count) for row, count in zip(features, counts, strict=True)
    ]
    tokens = chain.from_iterable(chain(row.input_ids, row.labels or ()) for row in features)
    numbers = [np.array([len(features), *chain.from_iterable(table)], dtype="<i4"), np.fromiter(tokens, dtype="<i4")]
    digest = hashlib.sha256(key)
    for part in numbers:
        digest.update(part.data)
    remove_partials(path.parent)
    with written_atomically(path, durable=False) as handle:  # what a crash of the machine damages is found by its hash
        for part in (_MAGIC, digest.digest(), key, *numbers):
            handle.buffer.write(part)


def _drop_oldest(folder: Path) -> None:
    """Keep the cache within its bytes. A file in use by another run stays readable to it."""
    files = sorted(folder.glob(f"*/{_NAME}"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > _MOST_BYTES:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                path.parent.rmdir()
