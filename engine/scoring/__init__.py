"""Scores of strings, with no files and no recipe.

rouge      Korean-aware ROUGE; its three tokenizers say where words are cut: at morphemes, characters or white space
endings    how summaries end, their scripts and lengths
baselines  what a score is held against: the first turns, and facts that must stand in a summary
floors     both baselines of a run, measured on its rows
constant   the one sentence that scores best for every row
alike      how much of the predictions is one text
extra      metrics of a user's own, made into scores
bertscore  the most similar token of the other text, by an encoder's vectors
intervals  bootstrap intervals, paired differences, and the gain of picking the best of many
"""
