"""Encodings are found block by block, wherever the blocks are cut."""

from __future__ import annotations

import codecs

import pytest

from engine.data.encodings import find_encoding
from engine.errors import EngineError

TEXT = "가나다 ABC 라마바\n" * 5


def blocks_of(data, size):
    return lambda: (data[at : at + size] for at in range(0, len(data), size))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_the_same_answer_for_every_size_of_block(size):
    damaged = bytearray(TEXT.encode())
    damaged[30] = 0xFF
    cases = [
        (TEXT.encode(), "auto", ("utf-8", "strict")),
        (TEXT.encode("cp949"), "auto", ("cp949", "strict")),
        (TEXT.encode("utf-16"), "utf-16", ("utf-16", "strict")),
        (bytes(damaged), "auto", ("utf-8", "surrogateescape")),
        (b"", "auto", ("utf-8", "strict")),
    ]
    for data, wanted, expected in cases:
        assert find_encoding(blocks_of(data, size), wanted, "f") == expected


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("wanted", ["auto", "utf-8", "utf-8-sig", "cp949"])
def test_the_first_bad_byte_is_named_by_offset_and_line(size, wanted):
    head = codecs.BOM_UTF8 * (wanted == "utf-8-sig") + b"abc\ndef\nghi "
    with pytest.raises(EngineError) as caught:
        find_encoding(blocks_of(head + b"\xff\xff\xe9", size), wanted, "f")
    assert caught.value.code == "E3.2" and f"byte 0xff at offset {len(head)}, line 3" in str(caught.value)
