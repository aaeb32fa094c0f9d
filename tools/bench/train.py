#!/usr/bin/env python3
"""This engine's training beside transformers' and TRL's trainers: the same model, rows, precision and batch size, in turns.

    python tools/bench/train.py --shape bart|qwen3|kobart [--data DIALOGUES.csv --tokenizer FOLDER] [--source TOKENS]
                                [--updates N] [--rounds N] [--ranks 1|2] [--precision bf16] [--output FILE.json]

Models have random weights: `bart` is 3 + 3 layers of width 256 over 30,000 tokens; `qwen3` is 6 layers of width 512 over
Qwen3's 151,936 tokens, on chat rows; `kobart` is KoBART's, for a GPU. Without `--data` the quickstart's dialogues serve, in
pairs, with a tokenizer trained on them. Each contender trains in a process of its own, one after the other in each round; the
first update of each is not counted. Medians over rounds; ratios are to the first contender.

`ours, fsdp` shards over the ranks, and a contender followed by `, counted` counts what ranks send in an update.
`ours` has this project's defaults; `ours, in order` and `trainer, in order` see identical batches. What is `recomputed` has
gradient checkpointing on, which is TRL's default. TRL is measured where it is installed (`pip install trl datasets`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import made_up  # noqa: E402
from shapes import values_of  # noqa: E402
from traffic import Traffic  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from engine.data.encode import Feature
    from engine.models.bundle import ModelBundle

SHAPES: dict[str, dict[str, Any]] = {
    "bart": {
        "config": {
            "model_type": "bart", "d_model": 256, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 1024,
            "decoder_ffn_dim": 1024, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 30_000,
            "max_position_embeddings": 1026,
        },
        "rows": 16,
        "contenders": ("ours", "ours, in order", "trainer", "trainer, in order"),
    },
    "qwen3": {
        "config": {
            "model_type": "qwen3", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 151_936,
            "tie_word_embeddings": True, "max_position_embeddings": 4096,
        },
        "rows": 8,
        "contenders": ("ours", "ours, in order", "ours, recomputed", "trainer, in order", "trl", "trl, recomputed"),
    },
    "kobart": {"config": values_of("kobart"), "rows": 64, "contenders": ("ours", "trainer")},
}  # fmt: skip


@dataclass
class Meter:
    """Counts what passes through each update of one contender."""

    laps: list[dict[str, float]] = field(default_factory=list)
    cells: int = 0
    real: int = 0
    supervised: int = 0
    rows: int = 0
    since: float = 0.0
    traffic: Traffic | None = None

    def count(self, batch: dict[str, Tensor]) -> None:
        labels, mask = batch["labels"], batch["attention_mask"]
        self.rows += len(labels)
        self.cells += mask.numel()
        self.real += int(mask.sum())
        supervised = int((labels != -100).sum())
        self.supervised += supervised
        if "decoder_input_ids" in batch:
            self.cells += labels.numel()
            self.real += supervised

    def lap(self) -> None:
        now = time.perf_counter()
        numbers = {name: getattr(self, name) for name in ("cells", "real", "supervised", "rows")}
        sent = dict(self.traffic.counts) if self.traffic is not None else {}
        self.laps.append(numbers | {"seconds": now - self.since} | sent)
        self.start()

    def start(self) -> None:
        self.cells = self.real = self.supervised = self.rows = 0
        self.since = time.perf_counter()

    def result(self) -> dict[str, float]:
        from engine.runtime.peak_memory import measured_peak

        if self.traffic is not None:
            first, last = self.laps[0], self.laps[-1]
            sent = {name: last[name] - first.get(name, 0) for name in self.traffic.counts}
            return {name: count / (len(self.laps) - 1) for name, count in sent.items() if count}
        counted = self.laps[1:]  # the first one allocates
        total = {name: sum(lap[name] for lap in counted) for name in counted[0]}
        ranks = int(os.environ.get("WORLD_SIZE", "1"))  # this one stands for all
        rates = {name: ranks * total[name] / total["seconds"] for name in ("rows", "real", "supervised")}
        return {
            "samples_per_second": rates["rows"],
            "real_tokens_per_second": rates["real"],
            "supervised_tokens_per_second": rates["supervised"],
            "seconds_per_update": statistics.median(lap["seconds"] for lap in counted),
            "padding_share": 1.0 - total["real"] / total["cells"],
            "peak_gib": measured_peak(_device()),
        }


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def write_model(shape: str, tokenizer: Path, folder: Path, *, tiny: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    values = values_of(shape, tiny=True) if tiny else dict(SHAPES[shape]["config"])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    kind.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def sizes_of(folder: Path) -> dict[str, int]:
    """Numbers in each stored weight of a model folder, by name."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}


def rows_of(options: argparse.Namespace) -> int:
    """Rows of a rank in an update."""
    return (8 if options.tiny else SHAPES[options.shape]["rows"]) // options.ranks


def recipe_of(options: argparse.Namespace, work: Path, batching: str) -> Any:
    from engine.recipe.schema import Recipe

    return Recipe(
        experiment={"output_dir": str(work / "run"), "output_root": str(work)},
        model={"name_or_path": str(work / "model")},
        tokenizer={"added_tokens": []},
        data={
            "train_file": str(options.data), "text_column": "dialogue", "summary_column": "summary", "batching": batching,
            "max_source_length": options.source, "max_target_length": 100,
        },
        prompt={"style": "chat" if options.shape == "qwen3" else "plain"},
        training={
            "per_device_train_batch_size": rows_of(options), "max_steps": options.updates,
            "precision": options.precision, "learning_rate": 1e-4, "logging_steps": 1,
            "gradient_checkpointing": "recomputed" in options.contender,
        },
        evaluation={"strategy": "no"},
        checkpoint={"strategy": "no"},
        distributed={"strategy": "fsdp" if "fsdp" in options.contender else "ddp"},
        tracking={"report_to": [], "progress": False},
    )  # fmt: skip


def run_ours(options: argparse.Namespace, work: Path, meter: Meter) -> None:
    from engine.train import run
    from engine.training import job

    batching = "sequential" if options.contender.endswith("in order") else "length"
    load, log = job.Job.load_window, job.Job.log_update

    def counted(self: job.Job, epoch: int, index: int) -> Any:
        if not meter.since:
            meter.start()
        window = load(self, epoch, index)
        for batch in window.batches:
            meter.count(batch)
        return window

    def lapped(self: job.Job, *arguments: Any) -> None:
        log(self, *arguments)
        meter.lap()

    job.Job.load_window, job.Job.log_update = counted, lapped
    job.Job.save = lambda self: None  # a save at the end is no part of an update
    try:
        run(recipe_of(options, work, batching))
    except Exception:
        if len(meter.laps) < options.updates:  # what comes after the last update misses its checkpoint
            raise


def laps_of(meter: Meter) -> Any:
    """A callback that lets transformers' trainers mark their updates."""
    from transformers import TrainerCallback

    class Laps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not meter.since:
                meter.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.lap()

    return Laps()


def run_trainer(options: argparse.Namespace, work: Path, meter: Meter) -> None:
    import torch
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

    bundle, features = prepared(options, work)
    seq2seq = bundle.family == "seq2seq"

    def collate(rows: list[Feature]) -> dict[str, Tensor]:
        batch = bundle.collate(rows)
        meter.count(batch)
        return batch

    ordered = options.contender.endswith("in order")
    sampler = {"_get_train_sampler": lambda self, *_: torch.utils.data.SequentialSampler(features)} if ordered else {}
    trainer = type("Peer", (Seq2SeqTrainer if seq2seq else Trainer,), sampler)(
        model=bundle.model,
        args=(Seq2SeqTrainingArguments if seq2seq else TrainingArguments)(**arguments_of(options, work)),
        train_dataset=features,
        data_collator=collate,
        callbacks=[laps_of(meter)],
    )
    trainer.train()


def run_trl(options: argparse.Namespace, work: Path, meter: Meter) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    bundle, features = prepared(options, work)
    # TRL's own loss and collator, on the very token ids that the other contenders train on
    rows = {
        "input_ids": [list(feature.input_ids) for feature in features],
        "completion_mask": [[int(label != -100) for label in feature.labels] for feature in features],
    }
    del bundle

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(work / "model", dtype="float32"),
        args=SFTConfig(**arguments_of(options, work), completion_only_loss=True, max_length=None),
        train_dataset=Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(work / "model"),
        callbacks=[laps_of(meter)],
    )
    inner = trainer.data_collator

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = inner(examples)
        meter.count(batch)
        return batch

    trainer.data_collator = collate
    trainer.train()


def prepared(options: argparse.Namespace, work: Path) -> tuple[ModelBundle, list[Feature]]:
    """The bundle and rows that this engine trains on, for a peer."""
    from engine.data import encode, rows
    from engine.models.build import build_model

    recipe = recipe_of(options, work, "length")
    bundle = build_model(recipe, device=_device(), precision=options.precision)
    examples = rows.read_examples(recipe.data.train_file, recipe.data, require_summary=True)
    return bundle, encode.encode_all(bundle.text_encoder(), examples)


def arguments_of(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    return {
        "output_dir": str(work / "peer"),
        "max_steps": options.updates,
        "per_device_train_batch_size": rows_of(options),
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": _device().type == "cpu",
        "bf16": options.precision == "bf16",
        "gradient_checkpointing": "recomputed" in options.contender,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "optim": "adamw_torch",
    }


def contend(options: argparse.Namespace) -> None:
    """One contender, in this process: a line of JSON on stdout."""
    counted = options.contender.endswith(", counted")
    meter = Meter(traffic=Traffic() if counted else None)
    runners = {"ours": run_ours, "trainer": run_trainer, "trl": run_trl}
    with meter.traffic or nullcontext():
        runners[options.contender.partition(",")[0]](options, options.work, meter)
    if int(os.environ.get("RANK", "0")) == 0:
        print("RESULT", json.dumps(meter.result()), flush=True)


def measured(options: argparse.Namespace, contender: str, model: Path) -> dict[str, float]:
    command = [sys.executable]
    environment = dict(os.environ)
    if options.ranks > 1:
        command += [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(options.ranks),
            "--rdzv-endpoint=localhost:0",
        ]
        command += ["--rdzv-backend=c10d"]
        environment |= {"OMP_NUM_THREADS": "1"} | ({} if _device().type == "cuda" else {"ACCELERATE_USE_CPU": "true"})
    command += [__file__, "--shape", options.shape, "--data", str(options.data), "--updates", str(options.updates)]
    command += [
        "--source",
        str(options.source),
        "--ranks",
        str(options.ranks),
        "--precision",
        options.precision,
        *(["--tiny"] if options.tiny else []),
        "--contender",
        contender,
    ]
    with tempfile.TemporaryDirectory() as work:  # one for all ranks
        (Path(work) / "model").symlink_to(model)
        done = subprocess.run([*command, "--work", work], env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{contender} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--data", type=Path, help="CSV with dialogue and summary columns")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer whose ids the shape's vocabulary holds")
    parser.add_argument("--source", type=int, default=512, help="most tokens of a dialogue")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--tiny", action="store_true", help="a toy of the shape kobart")
    parser.add_argument("--contenders", nargs="+", help="some of the shape's, the one to compare with first")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        contend(options)
        return 0
    names = options.contenders or SHAPES[options.shape]["contenders"]
    missing = importlib.util.find_spec("trl") is None
    names = [name for name in names if not name.startswith("trl") or not missing]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        if options.data is None:
            options.data, options.tokenizer = made_up.write(Path(folder), 100 if options.tiny else None)
        options.data = options.data.resolve()
        write_model(options.shape, options.tokenizer, model, tiny=options.tiny)
        rounds = [{name: measured(options, name, model) for name in names} for _ in range(options.rounds)]
    medians = {
        name: {key: statistics.median(one[name][key] for one in rounds) for key in rounds[0][name]} for name in names
    }
    first = medians[names[0]]
    ratios = {
        name: {key: first[key] / value[key] for key in ("real_tokens_per_second", "samples_per_second", "peak_gib")}
        for name, value in medians.items()
    }
    packages = ["torch", "transformers", "accelerate", *([] if missing else ["trl"])]
    record = {
        "shape": options.shape,
        "source": options.source,
        "updates": options.updates,
        "rounds": options.rounds,
        "ranks": options.ranks,
        "precision": options.precision,
        "device": str(_device()),
        "processors": os.cpu_count(),
        "medians": medians,
        "ratio_of_first": ratios,
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "all_rounds": rounds,
    }
    for name, value in medians.items():
        print(f"{name:20} " + "  ".join(f"{key} {number:.3f}" for key, number in value.items()))
    for name, value in ratios.items():
        print(f"{names[0]} / {name}: " + "  ".join(f"{key} {number:.2f}" for key, number in value.items()))
    if options.output:
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
