"""The recipe reader under random and hostile input: it answers in time, with a recipe or an EngineError, and builds nothing."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import yaml

from engine import load_recipe
from engine.errors import EngineError
from engine.recipe.dump import dump
from engine.recipe.yaml_subset import flow, parse, write

HEAD = "model:\n  name_or_path: m\ndata:\n  train_file: t.csv\n  validation_file: d.csv\n"
SECONDS = float(os.environ.get("FUZZ_SECONDS", "4"))  # of each of the two campaigns
PIECES = [
    *"{}[]:,-?*&!|>'\"%@`#\\~=<",
    *(
        "\n",
        "\n  ",
        "\n\t",
        ": ",
        "- ",
        "? ",
        "<<: ",
        "--- ",
        "...",
        "\r\n",
        "\ufeff",
        "\u2028",
        "\x85",
        "\0",
        "é",
        "한글",
    ),
    *(
        "&a ",
        "*a",
        "!!int ",
        "!!python/name:os.system ",
        "!<x>",
        "%YAML 9.9\n",
        "%TAG ! x\n",
        '"\\UFFFFFFFF"',
        '"\\ud800"',
    ),
    *(
        "1e5",
        "1e-5",
        ".inf",
        ".nan",
        "true",
        "no",
        "null",
        "010",
        "0x1f",
        "12:30",
        "1_0",
        "9" * 400,
        "training",
        "seed",
    ),
    *(
        "base: ",
        "r.yaml",
        "base: r.yaml\n",
        "[" * 40,
        "{a: " * 40,
        "generation:\n  num_beams: ",
        "\ntraining:\n  seed: ",
    ),
]


def settle(path: Path, overrides: list[str]) -> None:
    """Read once; only two outcomes are allowed."""
    try:
        recipe = load_recipe(path, overrides)
    except EngineError as error:
        assert error.exit_code == 2
        text = str(error)
        assert text.startswith("error E2.") and all(line.startswith("error E2.") for line in text.splitlines())
        return
    path.with_name("again.yaml").write_text(dump(recipe), encoding="utf-8")
    assert load_recipe(path.with_name("again.yaml")) == recipe


def mutated(rng: random.Random, text: str) -> str:
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(text) + 1)
        stop = min(len(text), start + rng.choice([0, 0, 1, 3, 20]))
        text = text[:start] + rng.choice(PIECES) * rng.choice([1, 1, 1, 5]) + text[stop:]
    return text


def corpus(root: Path) -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in sorted((root / "recipes").rglob("*.yaml"))]
    return [HEAD, *(text.replace("base: base/", "base: ") for text in texts)]


def test_mutated_recipes(tmp_path: Path, root: Path) -> None:
    rng, texts, rounds = random.Random(20), corpus(root), 0
    for base in (root / "recipes" / "base").glob("*.yaml"):
        (tmp_path / base.name).write_bytes(base.read_bytes())
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        path = tmp_path / "r.yaml"
        path.write_text(mutated(rng, rng.choice(texts)), encoding="utf-8", errors="surrogatepass", newline="")
        settle(path, [mutated(rng, "training.seed=5") for _ in range(rng.choice([0, 0, 1, 2]))])
        rounds += 1
    assert rounds > 20


@pytest.mark.slow
def test_random_bytes_and_pieces(tmp_path: Path) -> None:
    rng, rounds = random.Random(21), 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        pieces = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 60))).encode("utf-8", "surrogatepass")
        noise = rng.randbytes(rng.randint(0, 200))
        (tmp_path / "r.yaml").write_bytes(rng.choice([pieces, noise, HEAD.encode() + pieces, pieces + noise]))
        settle(tmp_path / "r.yaml", [])
        rounds += 1
    assert rounds > 20


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: " + "[" * 100_000,
        "a: " + "{a: " * 100_000,
        "- " * 200_000,
        "? " * 200_000,
        "training:\n" + "".join(f"  key{n}: {n}\n" for n in range(30_000)),
        "a: [" + "1, " * 300_000 + "]",
        "a: '" + "''" * 400_000 + "'",
        'a: "' + "\\x41" * 200_000 + '"',
        "#" * 1_000_000 + "\n" + HEAD,
        "\n" * 1_000_000 + HEAD,
        "training:\n  seed: " + "9" * 1_000_000,
        "training:\n  learning_rate: 1e" + "9" * 1_000_000,
        "a" * 1_000_000 + ": 1\n",
        "&" * 1_000_000,
        "a: |\n" + "  x\n" * 200_000,
        "[[[[a]: b]: c]: d]\n",
        "? ? a\n: b\n",
    ],
    ids=range(18),
)
def test_bombs_are_refused_quickly(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    start = time.monotonic()
    settle(tmp_path / "r.yaml", [])
    assert time.monotonic() - start < 20  # seconds; on a busy machine, where the slowest of these needs about two


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {canary}']",
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]",
        "!!python/object/new:os.system ['touch {canary}']",
        "!!python/name:os.system",
        "!!python/module:antigravity",
        "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch {canary}']",
        "!!map {{__reduce__: x}}",
        "!custom x",
    ],
)
def test_tags_build_nothing(tmp_path: Path, tag: str) -> None:
    canary = tmp_path / "canary"
    for text in (tag, f"{HEAD}experiment:\n  notes: {tag}\n", f"{tag}: x"):
        (tmp_path / "r.yaml").write_text(text.format(canary=canary), encoding="utf-8")
        with pytest.raises(EngineError, match=r"error E2\.1: "):
            load_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text(HEAD, encoding="utf-8")
    with pytest.raises(EngineError):
        load_recipe(tmp_path / "r.yaml", [f"training.seed={{a: {tag.format(canary=canary)}}}"])
    assert load_recipe(tmp_path / "r.yaml", [f"experiment.notes={tag}"]).experiment.notes == tag, (
        "plain text stays text"
    )
    assert not canary.exists()


def test_parse_keeps_lines_and_collects_problems() -> None:
    document = parse("a:\n  b: 1\n  b: 2\nc: *x\nd: &y 1\n")
    assert document.value == {"a": {"b": 1}, "c": None, "d": 1}
    assert document.lines == {("a",): 1, ("a", "b"): 2, ("c",): 4, ("d",): 5}
    assert [line for line, _ in document.problems] == [3, 4, 5]


LETTERS = [*"abeEnoy019.,:;-+_#&*!|>'\"%@`~=<?{}[]()/\\ \n\t\r\x85\u2028\ufeff\u202e\x1b한😀"]
WORDS = [
    "1e5",
    "1e-5",
    "-.5e3",
    "010",
    "0x1f",
    "1_0",
    "12:30",
    "null",
    "~",
    "yes",
    "no",
    "True",
    ".inf",
    "=",
    "<<",
    "---",
]


def value(rng: random.Random, depth: int = 0) -> object:
    """A random value that a recipe may hold."""
    text = rng.choice(WORDS) if rng.random() < 0.3 else "".join(rng.choices(LETTERS, k=rng.choice([0, 1, 2, 5, 200])))
    kind = rng.randrange(10)
    if kind < 2 and depth < 4:
        return {str(value(rng, 9)): value(rng, depth + 1) for _ in range(rng.randint(0, 4))}
    if kind < 4 and depth < 4:
        return [value(rng, depth + 1) for _ in range(rng.randint(0, 6))]
    return rng.choice(
        [None, True, False, rng.randint(-(10**6), 10**6), rng.uniform(-1, 1) * 10 ** rng.randint(-30, 30), text]
    )


def test_what_is_written_is_read_back_by_us_and_by_yaml_1_1() -> None:
    rng = random.Random(22)
    for _ in range(150):
        wanted = {"key": value(rng), "text": value(rng, 9), "more": {str(value(rng, 9)): value(rng)}}
        for text in (write(wanted), f"{{key: {flow(wanted['key'])}}}\n", f"key: {flow([wanted])[1:-1]}\n"):
            document = parse(text)
            assert not document.problems and all(c.isprintable() or c == "\n" for c in text)
            assert document.value == yaml.safe_load(text)
        assert parse(write(wanted)).value == wanted and parse(flow(wanted)).value == wanted
        assert "\n" not in flow(wanted)


def test_a_value_used_twice_is_written_twice() -> None:
    twice = ["x"]
    assert write({"a": twice, "b": twice}) == "a: [x]\nb: [x]\n"
