"""Which encoding a text file is in, found block by block: the file need not fit in memory."""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Callable, Iterable, Iterator

from engine.errors import EngineError

log = logging.getLogger("engine.data")

Blocks = Callable[[], Iterable[bytes]]  # the file's bytes from the beginning, each time it is called
_WIDE = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def find_encoding(blocks: Blocks, wanted: str, place: str) -> tuple[str, str]:
    """`encoding` and `errors` under which `open` reads the whole file. A byte order mark may be left at its beginning.

    Args:
        wanted: a codec's name, or "auto": UTF-8, then CP949. Damaged UTF-8 comes with its bytes as surrogates, so that the
            rows that hold them can be named.
        place: the file's name for messages.

    Raises:
        EngineError: E3.2 where no such text is in the file.
    """
    head = next(iter(blocks()), b"")
    wide = next((name for bom, name in _WIDE.items() if head.startswith(bom)), None)
    if wanted == "auto" and wide:
        raise EngineError("E3.2", f"the file is {wide.upper()}", place, f"set data.encoding: {wide}")
    try:
        codec = codecs.lookup("utf-8" if wanted == "auto" else wanted)
    except (LookupError, ValueError) as error:
        what = f"unknown encoding {wanted!r}"
        raise EngineError("E3.2", what, "data.encoding", "auto, utf-8, cp949 or utf-16") from error
    failure = _failure(blocks, codec, place)
    if failure is None:
        return codec.name, "strict"
    if not codec.name.startswith("utf-8"):
        raise failure
    if _mostly_utf8(blocks):
        return codec.name, "surrogateescape"
    if wanted != "auto" or _failure(blocks, codecs.lookup("cp949"), place) is not None:
        raise failure
    log.warning("%s is not UTF-8; it was read as CP949", place)
    return "cp949", "strict"


def _failure(blocks: Blocks, codec: codecs.CodecInfo, place: str) -> EngineError | None:
    """Where the file is no text of that codec; None where it is."""
    before = lines = 0  # bytes and line ends ahead of the block
    block = b""
    try:
        decoder = codec.incrementaldecoder("strict")
        for block in _ended(blocks()):
            if not isinstance(decoder.decode(block, final=not block), str):
                raise TypeError("it makes no text")
            before, lines = before + len(block), lines + block.count(b"\n")
    except EngineError:
        raise  # the file cannot be read
    except UnicodeDecodeError as error:
        data, kept = error.object, len(error.object) - len(block)  # bytes that the decoder kept from blocks before
        line = lines + data.count(b"\n", max(0, kept), error.start) + 1
        return EngineError(
            "E3.2",
            f"not {error.encoding.upper()}: byte 0x{data[error.start]:02x} at offset {before - kept + error.start}, "
            f"line {line}",
            place,
            "set data.encoding to the file's encoding, or save it as UTF-8",
        )
    except Exception as error:  # codecs that are not of text (`hex`, `zip`) fail in their own ways
        return EngineError("E3.2", f"{codec.name!r} does not decode this file: {error}", place, "set data.encoding")
    return None


def _ended(blocks: Iterable[bytes]) -> Iterator[bytes]:
    yield from blocks
    yield b""


def _mostly_utf8(blocks: Blocks) -> bool:
    """More Hangul than damage."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    hangul = damage = 0
    for block in _ended(blocks()):
        text = decoder.decode(block, final=not block)
        hangul, damage = hangul + len(re.findall("[가-힣]", text)), damage + text.count("\ufffd")
    return hangul > damage
