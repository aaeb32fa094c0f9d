"""Decoding: settings, processors, beam search with one cache per example. Tensors in, tensors out; knows no files."""
