"""Scores on strings: Korean-aware ROUGE, how summaries end, baselines, bootstrap intervals. Pure: no files, no recipe."""
