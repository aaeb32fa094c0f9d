#!/usr/bin/env python3
"""Speed of decoding: transformers' `generate`, ours, and CTranslate2 on the same model, inputs and settings.

    python tools/bench/generate.py kobart                 # 16 dialogues x 5 beams, 60 new tokens each
    python tools/bench/generate.py trained-like           # 100 dialogues whose outputs end at different lengths
    python tools/bench/generate.py qwen3                  # causal, real vocabulary, prompts of 300-400 tokens
    python tools/bench/generate.py kobart --device cuda --dtype float32 --output tools/bench/results/kobart-cuda.json
    python tools/bench/generate.py llama-3.2-3b --random --device cuda --dtype bfloat16   # also qwen3-4b

Weights are random (shapes and tokenizers are real), inputs are real dialogues out of `--data`, or with `--random` tokens by
chance, as many as dialogues have. Contenders take turns,
so that a busy machine slows all of them; ratios are medians over rounds of the other's time by ours in the same round.
`cpu_seconds` (of all threads) tell more than the clock where other programs run too; with more than one thread they
count waiting for each other as well.
Tokens are compared with `generate`'s; a difference is accepted only as a tie (see `tie_gap`). CTranslate2, where it is
installed, runs float32 on the CPU with the same beams and lengths; its search differs in details, so only its time counts.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import torch  # noqa: E402
import transformers  # noqa: E402
from shapes import values_of  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.generation.api import Hypothesis, generate_all, pad  # noqa: E402
from engine.generation.search import Search  # noqa: E402
from engine.generation.settings import GenerationSettings  # noqa: E402

TIE = 2e-4  # accumulated log-probability; float32 rounding of two summation orders stays far below


@dataclass
class Case:
    """What is decoded. `batch_size`: of `generate`, in input order; `results` per contender are token ids per prompt."""

    name: str
    model: torch.nn.Module
    tokenizer: object
    prompts: list[list[int]]
    values: dict
    batch_size: int
    pad_id: int

    @property
    def encoder_decoder(self) -> bool:
        return self.model.config.is_encoder_decoder

    def settings(self) -> GenerationSettings:
        return GenerationSettings.resolve(
            self.values | {"repetition_scope": "all"},
            model_generation_config=self.model.generation_config,
            is_encoder_decoder=self.encoder_decoder,
        )


# --- cases ----------------------------------------------------------------------------------------------------------


def dialogues(data: Path, count: int) -> list[str]:
    with open(data / "dialogsum_ko" / "test.csv", encoding="utf-8") as file:
        return [row["dialogue"] for row in csv.DictReader(file)][:count]


def kobart(options: argparse.Namespace) -> Case:
    """KoBART's exact shape. Weights wider than its training start (0.02), so that candidates are apart."""
    folder = options.data / "tokenizers" / "kobart"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig.from_pretrained(folder, init_std=0.06)).eval()
    model.generation_config = GenerationConfig.from_pretrained(folder)
    prompts = tokenizer(dialogues(options.data, options.examples), truncation=True, max_length=512)["input_ids"]
    return Case("kobart", model, tokenizer, prompts, fixed_lengths(options), 16, tokenizer.pad_token_id)


def trained_like(options: argparse.Namespace) -> Case:
    """The same, but outputs end by themselves, at lengths spread as a trained model's are (mean about a third of the cap).

    The end token's bias is searched for, on the first prompts, until the mean length fits.
    """
    case, new_tokens = kobart(options), options.new_tokens
    case.name = "trained-like"
    case.batch_size = 20
    case.values |= {"min_new_tokens": 8, "early_stopping": True}
    bias = case.model.final_logits_bias
    low, high = 0.0, 40.0
    for _ in range(7):
        bias[0, 1] = (low + high) / 2
        found = generate_all(case.model, case.prompts[:8], case.settings(), pad_token_id=case.pad_id)
        mean = sum(len(h[0].token_ids) for h in found) / len(found)
        low, high = (low, float(bias[0, 1])) if mean < new_tokens / 3 else (float(bias[0, 1]), high)
    return case


def qwen3(options: argparse.Namespace) -> Case:
    """Real vocabulary, hidden 512, 8 layers; prompts of 300-400 tokens cut from joined dialogues."""
    tokenizer, count = AutoTokenizer.from_pretrained(options.data / "tokenizers" / "qwen3"), options.examples
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.06,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    stream = tokenizer("\n".join(dialogues(options.data, 60)))["input_ids"]
    lengths = [300 + 100 * i // max(count - 1, 1) for i in range(count)]
    prompts = [stream[400 * i : 400 * i + length] for i, length in enumerate(lengths)]
    return Case("qwen3", model, tokenizer, prompts, fixed_lengths(options), count, tokenizer.pad_token_id)


def random_kobart(options: argparse.Namespace) -> Case:
    """KoBART's shape on tokens by chance, as many as the 499 test dialogues have: 207 on average, 106 up or down."""
    values = values_of("kobart", options.tiny)
    torch.manual_seed(0)
    config = AutoConfig.for_model(values.pop("model_type"), **values, init_std=0.06)
    with torch.device(options.device):
        model = BartForConditionalGeneration(config).eval()
    lengths = (207 + 106 * torch.randn(options.examples)).clamp(50, 512).long().tolist()
    prompts = [torch.randint(4, config.vocab_size, (length,)).tolist() for length in lengths]
    return Case("kobart", model, None, prompts, fixed_lengths(options), 16, config.pad_token_id)


def random_causal(options: argparse.Namespace) -> Case:
    """A real shape with random weights, made on the device in the type asked for; prompts of 800 tokens by chance."""
    values = values_of(options.case, options.tiny)
    torch.manual_seed(0)
    config = AutoConfig.for_model(values.pop("model_type"), **values, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()
    prompts = torch.randint(3, config.vocab_size, (options.examples, 80 if options.tiny else 800)).tolist()
    return Case(options.case, model, None, prompts, fixed_lengths(options), options.examples, 0)


def fixed_lengths(options: argparse.Namespace) -> dict:
    return {"num_beams": options.beams, "max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}


# name -> prompts, new tokens, beams, the case of real dialogues, the one of tokens by chance
CASES = {
    "kobart": (16, 60, 5, kobart, random_kobart),
    "trained-like": (100, 100, 5, trained_like, None),
    "qwen3": (8, 60, 5, qwen3, None),
    "llama-3.2-3b": (16, 100, 4, None, random_causal),
    "qwen3-4b": (16, 100, 4, None, random_causal),
}


# --- contenders: each returns token ids per prompt ------------------------------------------------------------------


def run_generate(case: Case) -> list[list[int]]:
    rows: list[list[int]] = []
    for first in range(0, len(case.prompts), case.batch_size):
        ids, mask = inputs_of(case, case.prompts[first : first + case.batch_size])
        out = case.model.generate(input_ids=ids, attention_mask=mask, **hf_values(case))
        start = 1 if case.encoder_decoder else ids.shape[1]
        rows += out[:, start:].tolist()
    return rows


def run_ours(case: Case, vocabulary_mask: torch.Tensor | None = None, cuda_graphs: bool = False) -> list[list[int]]:
    found: list[list[Hypothesis]] = generate_all(
        case.model,
        case.prompts,
        replace(case.settings(), cuda_graphs=cuda_graphs),
        pad_token_id=case.pad_id,
        max_batch_size=32,
        vocabulary_mask=vocabulary_mask,
    )
    return [results[0].token_ids for results in found]


def ctranslate2_contender(case: Case, threads: int) -> Callable[[Case], list[list[int]]] | None:
    """Converts the model once; None where CTranslate2 is missing or cannot read it."""
    try:
        import ctranslate2
        from ctranslate2.converters import TransformersConverter
    except ImportError:
        return None
    folder = tempfile.mkdtemp(prefix="bench-ct2-")
    case.model.save_pretrained(f"{folder}/hf")
    case.tokenizer.save_pretrained(f"{folder}/hf")
    try:
        TransformersConverter(f"{folder}/hf").convert(f"{folder}/ct2", force=True)
    except Exception as error:  # another library's converter: whatever it raises, the benchmark goes on without it
        print(f"CTranslate2 cannot convert {case.name}: {error}", file=sys.stderr)
        return None
    translator = ctranslate2.Translator(f"{folder}/ct2", device="cpu", compute_type="float32", intra_threads=threads)
    sources = [case.tokenizer.convert_ids_to_tokens(prompt) for prompt in case.prompts]
    limits = {"max_decoding_length": case.values["max_new_tokens"]}
    limits["min_decoding_length"] = case.values.get("min_new_tokens", 1)

    def run(case: Case) -> list[list[int]]:
        results = translator.translate_batch(
            sources, beam_size=case.values["num_beams"], max_batch_size=16, return_scores=False, **limits
        )
        return [case.tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]

    return run


def inputs_of(case: Case, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return pad(prompts, case.pad_id, left=not case.encoder_decoder, device=case.model.device)


def hf_values(case: Case) -> dict:
    return {"max_length": None} | case.values


# --- tokens and memory ----------------------------------------------------------------------------------------------


def compare(case: Case, ours: list[list[int]], theirs: list[list[int]]) -> dict:
    """Examples with equal tokens, and the tie gap of each that differs."""
    gaps = {}
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine != other[: len(mine)]:
            gaps[i] = tie_gap(case, case.prompts[i], mine, other)
    return {"examples": len(ours), "equal": len(ours) - len(gaps), "tie_gaps": gaps}


def tie_gap(case: Case, prompt: list[int], mine: list[int], other: list[int]) -> float:
    """Accumulated score by which `generate` tells the two apart where they first differ, from its own step scores."""
    ids, mask = inputs_of(case, [prompt])
    out = case.model.generate(
        input_ids=ids, attention_mask=mask, **hf_values(case), return_dict_in_generate=True, output_scores=True
    )
    step = next(i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b)
    start = 1 if case.encoder_decoder else ids.shape[1]
    if out.sequences[0, start : start + step].tolist() != mine[:step]:
        return float("inf")
    beam = int(out.beam_indices[0, step])
    scores = out.scores[step][beam]
    return abs(float(scores[mine[step]] - scores[other[step]]))


def cache_bytes(case: Case) -> dict:
    """Bytes of keys and values at the end of the first batch: ours against `generate`'s (without its copies)."""
    ids, mask = inputs_of(case, case.prompts[: case.batch_size])
    arguments = {"input_ids": ids, "attention_mask": mask, "return_dict_in_generate": True} | hf_values(case)
    cache = case.model.generate(**arguments).past_key_values
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if case.encoder_decoder else [cache]
    theirs = sum(t.nbytes for part in parts for layer in part.layers for t in (layer.keys, layer.values))
    ours = case.model.generate(**arguments, custom_generate=Search()).cache_bytes
    return {"ours": ours, "generate": theirs, "ratio": ours / theirs}


def mask_cost(case: Case, blocked: int, rounds: int) -> dict:
    """What blocking so many tokens costs: whole decodings with and without, in turns.

    The blocked tokens are the last choices of this model's first step. Lengths are fixed, so the work is the same; `equal`
    counts the rows whose text does not change.
    """
    ids, mask = inputs_of(case, case.prompts)
    vocabulary = case.model.config.vocab_size
    order = case.model(input_ids=ids, attention_mask=mask).logits[:, -1].mean(dim=0).argsort()
    vocabulary_mask = torch.zeros(vocabulary).index_fill_(0, order[:blocked], float("-inf"))
    ways = {"free": None, "masked": vocabulary_mask}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, list[list[int]]] = {}
    for number in range(rounds):
        for way in ways if number % 2 == 0 else reversed(ways):
            seconds, _, found[way] = timed(lambda case, way=way: run_ours(case, ways[way]), case)
            taken[way].append(seconds)
            print(f"  mask round {number + 1} {way:12} {seconds:8.2f} s", file=sys.stderr, flush=True)
    equal = sum(one == other for one, other in zip(found["free"], found["masked"], strict=True))
    cost = statistics.median(b / a - 1 for a, b in zip(taken["free"], taken["masked"], strict=True))
    sizes = {"blocked": blocked, "vocabulary": vocabulary, "equal": equal, "examples": len(case.prompts)}
    return sizes | {"seconds": taken, "share_of_step": cost}


# --- measuring ------------------------------------------------------------------------------------------------------


def timed(run: Callable[[Case], list[list[int]]], case: Case) -> tuple[float, float, list[list[int]]]:
    """Seconds by the clock, seconds of processor time, and the result."""
    wait = torch.cuda.synchronize if case.model.device.type == "cuda" else lambda: None
    wait()
    clock, processor = time.perf_counter(), time.process_time()
    result = run(case)
    wait()
    return time.perf_counter() - clock, time.process_time() - processor, result


def measure(case: Case, contenders: dict[str, Callable], rounds: int) -> dict:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in contenders}
    results: dict[str, list[list[int]]] = {}
    order = list(contenders)
    for number in range(rounds):
        for name in order if number % 2 == 0 else reversed(order):
            taken, cpu, results[name] = timed(contenders[name], case)
            seconds[name].append(taken)
            cpu_seconds[name].append(cpu)
            print(f"  round {number + 1} {name:12} {taken:8.2f} s   cpu {cpu:8.2f} s", file=sys.stderr, flush=True)
    lengths = [len(ids) for ids in results["ours"]]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "times_ours": ratios(seconds),
        "cpu_times_ours": ratios(cpu_seconds),
        "tokens": compare(case, results["ours"], results["generate"]) if "generate" in results else None,
        "tokens_of_graphs_equal_ours": results["graphs"] == results["ours"] if "graphs" in results else None,
        "new_tokens": {"mean": statistics.mean(lengths), "min": min(lengths), "max": max(lengths)},
    }


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Each contender's time by ours of the same round, median over rounds."""
    ours = seconds["ours"]
    others = {name: times for name, times in seconds.items() if name != "ours"}
    return {name: statistics.median(a / b for a, b in zip(times, ours, strict=True)) for name, times in others.items()}


def environment(arguments: argparse.Namespace) -> dict:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    try:
        import ctranslate2

        versions["ctranslate2"] = ctranslate2.__version__
    except ImportError:
        pass
    cuda = torch.cuda.get_device_name() if arguments.device == "cuda" else None
    return {
        "versions": versions,
        "device": cuda or platform.processor() or platform.machine(),
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="tokenizers and dialogues")
    parser.add_argument("--examples", type=int, help="how many prompts (default: the case's own)")
    parser.add_argument("--new-tokens", type=int, help="most new tokens (default: the case's own)")
    parser.add_argument("--beams", type=int, help="default: the case's own")
    parser.add_argument("--random", action="store_true", help="tokens by chance: needs no data")
    parser.add_argument("--tiny", action="store_true", help="with --random: a toy of the same kind")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--only", nargs="+", choices=["generate", "ours", "graphs", "ctranslate2"], help="contenders")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    options = parser.parse_args(argv)
    examples, new_tokens, beams, *_ = CASES[options.case]
    options.examples, options.beams = options.examples or examples, options.beams or beams
    options.new_tokens = options.new_tokens or (20 if options.tiny else new_tokens)
    return options


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if not arguments.random and not arguments.data.exists():
        print(f"no data at {arguments.data}: give --data", file=sys.stderr)
        return 2
    build = CASES[arguments.case][-1 if arguments.random else -2]
    if build is None:
        print(
            f"{arguments.case} is a case {'of real dialogues' if arguments.random else 'for --random'} only",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(arguments.threads)
    case = build(arguments)
    case.model.to(device=arguments.device, dtype=getattr(torch, arguments.dtype))
    contenders: dict[str, Callable] = {"generate": run_generate, "ours": run_ours}
    if arguments.device == "cuda":
        contenders["graphs"] = partial(run_ours, cuda_graphs=True)
    if (
        arguments.device == "cpu"
        and case.encoder_decoder
        and case.tokenizer
        and "ctranslate2" in (arguments.only or ["ctranslate2"])
    ):
        if (run := ctranslate2_contender(case, arguments.threads)) is not None:
            contenders["ctranslate2"] = run
    contenders = {name: run for name, run in contenders.items() if name in (arguments.only or contenders)}
    load_before = os.getloadavg()[0]
    with torch.no_grad():
        result = {"case": case.name, "settings": case.values, "examples": len(case.prompts)}
        result |= environment(arguments) | measure(case, contenders, arguments.rounds)
        result["cache_bytes"] = cache_bytes(case) if "generate" in contenders else None
        if case.name == "qwen3" and arguments.device == "cpu":
            result["mask"] = mask_cost(case, 100_000, 5)
    result["load_average"] = {"before": load_before, "after": os.getloadavg()[0]}
    print(json.dumps({k: v for k, v in result.items() if k not in ("seconds", "cpu_seconds")}, indent=2))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    tokens = result["tokens"]
    if arguments.dtype != "float32":
        return 0  # exact ties are common there, and no rule decides them
    return 0 if tokens is None or all(gap < TIE for gap in tokens["tie_gaps"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
