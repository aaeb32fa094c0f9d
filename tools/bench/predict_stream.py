#!/usr/bin/env python3
"""What a long prediction costs in memory: many dialogues in shards, one of them killed and continued, against a few.

    python tools/bench/predict_stream.py [--rows N] [--few N] [--shards N] [--folder DIR] [--output FILE]

A random Bart of two small layers predicts `--few` dialogues in one run, and `--rows` of them in `--shards` runs of
`engine/predict.py --shard`, one after the other; the second one is killed (SIGKILL) about half-way and started again. The
shards are merged, and the merged file is held against the input by a reader of its own: every id once, in order. Peak memory
is the resident memory of each process as the kernel counts it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

TURNS = (
    "안녕하세요, 오늘 회의는 몇 시에 시작하나요?",
    "오후 세 시에 시작합니다. 자료를 준비해 주세요.",
    "주말에 뭐 할 거예요?",
    "친구와 함께 산에 갈 생각이에요. 날씨가 좋다고 하네요.",
    "네.",
)
SETTINGS = (
    "prompt.style=plain data.max_source_length=48 generation.num_beams=1 generation.max_new_tokens=3 "
    "evaluation.per_device_eval_batch_size=128 runtime.device=cpu runtime.num_threads=1"
).split()
# The toy is made in a process of its own: what is in memory here would count as the children's peak until they start.
MAKE_TOY = """
import sys
import torch
from transformers import BartConfig, BartForConditionalGeneration
from engine.data.vocabulary import train_tokenizer
folder, texts = sys.argv[1], sys.argv[2:]
tokenizer = train_tokenizer(texts, vocabulary_size=350, kind="unigram", added_tokens=["#Person1#", "#Person2#"], causal=False)
torch.manual_seed(0)
shape = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3, "forced_eos_token_id": None}
config = BartConfig(vocab_size=len(tokenizer), d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, **shape, **ids)
BartForConditionalGeneration(config).save_pretrained(folder)
tokenizer.save_pretrained(folder)
"""


def dialogue(row: int, stream: random.Random) -> str:
    turns = [f"#Person{1 + at % 2}#: {stream.choice(TURNS)}" for at in range(stream.randint(1, 8))]
    return "\n".join([*turns, f"#Person1#: {row}번입니다."])


def write_rows(path: Path, count: int) -> Path:
    stream = random.Random(0)
    with path.open("w", encoding="utf-8") as handle:
        for row in range(count):
            record = {"fname": f"row_{row}", "dialogue": dialogue(row, stream)}
            handle.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


class Prediction:
    """One process of `engine/predict.py`, measured."""

    def __init__(self, folder: Path, source: Path, output: Path, *options: str) -> None:
        command = [sys.executable, str(ROOT / "engine" / "predict.py"), str(folder / "model"), "--input", str(source)]
        self.log = folder / "predict.log"
        self._began = time.perf_counter()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--output", str(output), *options, *SETTINGS], stdout=log, stderr=log, cwd=ROOT
            )

    def ended(self) -> dict[str, Any]:
        """Seconds and peak once the process is gone, however it went."""
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        seconds = round(time.perf_counter() - self._began, 1)
        return {"seconds": seconds, "peak_mib": round(usage.ru_maxrss / 1024, 1), "code": self.process.returncode}

    def finished(self) -> dict[str, Any]:
        measured = self.ended()
        if measured.pop("code") != 0:
            raise SystemExit(self.log.read_text(encoding="utf-8", errors="replace")[-2000:])
        return measured


def killed_half_way(prediction: Prediction, kept: Path, lines: int) -> dict[str, Any]:
    """Kill a shard once it has kept that many windows."""
    while prediction.process.poll() is None and (not kept.exists() or kept.read_bytes().count(b"\n") < lines):
        time.sleep(0.05)
    prediction.process.send_signal(signal.SIGKILL)
    measured = prediction.ended() if prediction.process.returncode is None else {}
    if measured.pop("code", None) != -signal.SIGKILL:
        raise SystemExit("the shard was not killed in the middle; give more --rows")
    return measured


def measure(rows: int, few: int, shards: int, folder: Path) -> dict[str, Any]:
    from engine.prediction.shards import WINDOW, Shard

    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-c",
        MAKE_TOY,
        str(folder / "model"),
        *TURNS,
        "#Person1#: 0123456789번입니다. #Person2#:",
    ]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    record: dict[str, Any] = {"rows": rows, "window": WINDOW, "few_rows": few}
    small = write_rows(folder / "few.jsonl", few)
    record["few"] = Prediction(folder, small, folder / "few.csv").finished()
    source, output = write_rows(folder / "rows.jsonl", rows), folder / "rows.csv"
    record["input_mib"] = round(source.stat().st_size / 2**20, 1)
    record["shards"] = []
    for number in range(1, shards + 1):
        shard = Shard(number, shards)
        start = Prediction(folder, source, output, "--shard", f"{number}/{shards}")
        measured = {"rows": len(shard.rows(rows))}
        if number == 2:
            measured["killed"] = killed_half_way(start, shard.kept(output), len(shard.rows(rows)) // WINDOW // 2)
            start = Prediction(folder, source, output, "--shard", f"{number}/{shards}")
        measured |= start.finished()
        if number == 2:
            said = re.search(r"(\d+) of \d+ rows were decoded before", start.log.read_text(encoding="utf-8"))
            measured["rows_decoded_before_the_kill"] = int(said[1])
        record["shards"].append(measured)
        print(f"shard {number}: {measured}", file=sys.stderr)
    record["merge"] = Prediction(folder, source, output, "--merge-shards", str(shards)).finished()
    record["merged_rows"] = rows_in_order(source, output)
    record["left_behind"] = sorted(path.name for path in folder.glob("*shard*"))
    peaks = [shard["peak_mib"] for shard in record["shards"]] + [record["merge"]["peak_mib"]]
    record["peak_over_few"] = round(max(peaks) / record["few"]["peak_mib"], 3)
    return record


def rows_in_order(source: Path, output: Path) -> int:
    """Rows of the output; each stands for the row of the input in its place, and none is left over."""
    with source.open(encoding="utf-8") as rows, output.open(encoding="utf-8", newline="") as written:
        count = 0
        for row, line in zip(csv.DictReader(written), rows, strict=True):
            if row["fname"] != json.loads(line)["fname"] or not row["summary"]:
                raise SystemExit(f"row {count + 1} of the merged file is not that of the input")
            count += 1
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--few", type=int, default=2_000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    parser.add_argument("--output", type=Path, help="default: print only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        record = measure(args.rows, args.few, args.shards, args.folder or Path(temporary))
    text = json.dumps(record, indent=2) + "\n"
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
