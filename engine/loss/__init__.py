"""The loss of a batch, with no files, no recipe and no ranks.

cross_entropy  summed over supervised tokens; the one place that shifts labels
output_head    the same from hidden states, its logits a piece at a time
tied_lookup    embeddings that share the head's weight share its gradient too
"""
