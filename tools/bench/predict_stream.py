#!/usr/bin/env python3
"""What a long prediction costs in memory: many dialogues in shards, one of them killed and continued, against a few.

    python tools/bench/predict_stream.py [--rows N] [--few N] [--shards N] [--folder DIR] [--step STEP] [--output FILE]

A random Bart of two small layers predicts `--few` dialogues in one run, and `--rows` of them in `--shards` runs of
`engine/predict.py --shard`, one after the other; the second one is killed (SIGKILL) about half-way and started again. The
shards are merged, and the merged file is held against the input by a reader of its own: every id once, in order. Peak memory
is the resident memory of each process as the kernel counts it. With `--step` each part runs by itself in the same `--folder`:
`few` first, then `1`, `2` and so on, the shards, at once if there are processors, and `merge` last.
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
    "prompt.style=plain data.max_source_length=48 "
    "generation.num_beams=1 generation.min_new_tokens=2 generation.max_new_tokens=2 "
    "evaluation.per_device_eval_batch_size=256 runtime.device=cpu runtime.num_threads=1"
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

    def __init__(self, folder: Path, name: str, *options: str) -> None:
        """Predict the file `name`.jsonl of the folder into its `name`.csv."""
        command = [sys.executable, str(ROOT / "engine" / "predict.py"), str(folder / "model")]
        command += ["--input", str(folder / f"{name}.jsonl"), "--output", str(folder / f"{name}.csv")]
        self.log = folder / f"{name}{'-'.join(options).replace('/', '-of-')}.log"
        self._began = time.perf_counter()
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*command, *options, *SETTINGS], stdout=log, stderr=log, cwd=ROOT)

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


class Bench:
    """The steps; each leaves its figures in the folder."""

    def __init__(self, rows: int, few: int, shards: int, folder: Path) -> None:
        self.rows, self.few, self.shards, self.folder = rows, few, shards, folder
        self.steps = ["few", *map(str, range(1, shards + 1)), "merge"]

    def run(self, step: str) -> None:
        measured = self.measure_few() if step == "few" else self.merge() if step == "merge" else self.shard(int(step))
        print(f"{step}: {measured}", file=sys.stderr)
        (self.folder / f"measured-{step}.json").write_text(json.dumps(measured))

    def measure_few(self) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        texts = [*TURNS, "#Person1#: 0123456789번입니다. #Person2#:"]
        command = [sys.executable, "-c", MAKE_TOY, str(self.folder / "model"), *texts]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        write_rows(self.folder / "few.jsonl", self.few)
        write_rows(self.folder / "rows.jsonl", self.rows)
        return {"rows": self.few} | Prediction(self.folder, "few").finished()

    def shard(self, number: int) -> dict[str, Any]:
        from engine.prediction.shards import WINDOW, Shard

        shard, options = Shard(number, self.shards), ("--shard", f"{number}/{self.shards}")
        rows = len(shard.rows(self.rows))
        measured: dict[str, Any] = {"rows": rows}
        prediction = Prediction(self.folder, "rows", *options)
        if number == 2:
            kept = shard.kept(self.folder / "rows.csv")
            measured["killed"] = killed_half_way(prediction, kept, rows // WINDOW // 2)
            prediction = Prediction(self.folder, "rows", *options)
        measured |= prediction.finished()
        if number == 2:
            said = re.search(r"(\d+) of \d+ rows were decoded before", prediction.log.read_text(encoding="utf-8"))
            measured["rows_decoded_before_the_kill"] = int(said[1])
        return measured

    def merge(self) -> dict[str, Any]:
        measured = Prediction(self.folder, "rows", "--merge-shards", str(self.shards)).finished()
        rows = rows_in_order(self.folder / "rows.jsonl", self.folder / "rows.csv")
        left = sorted(path.name for path in self.folder.glob("rows.csv*") if path.name != "rows.csv")
        return {"rows": rows} | measured | {"left_behind": left}

    def record(self) -> dict[str, Any]:
        few, *parts, merge = (json.loads((self.folder / f"measured-{step}.json").read_text()) for step in self.steps)
        peaks = [part["peak_mib"] for part in (*parts, merge)]
        size = (self.folder / "rows.jsonl").stat().st_size / 2**20
        whole = {"rows": self.rows, "input_mib": round(size, 1), "few": few, "shards": parts, "merge": merge}
        return whole | {"peak_over_few": round(max(peaks) / few["peak_mib"], 3)}


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
    parser.add_argument("--step", help="only this one; needs --folder")
    parser.add_argument("--output", type=Path, help="default: print only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(args.rows, args.few, args.shards, args.folder or Path(temporary))
        for step in [args.step] if args.step else bench.steps:
            bench.run(step)
        if args.step not in (None, "merge"):
            return 0
        text = json.dumps(bench.record(), indent=2) + "\n"
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
