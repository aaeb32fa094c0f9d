"""Decoding: settings, constraints, beam search with one cache per example. Tensors in, tensors out; knows no files."""

from engine.generation.api import Generated, Hypothesis, generate, generate_all
from engine.generation.settings import GenerationSettings

__all__ = ["Generated", "GenerationSettings", "Hypothesis", "generate", "generate_all"]
