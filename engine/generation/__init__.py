"""Decoding: settings, constraints, beam search with one cache per example. Tensors in, tensors out; knows no files."""
