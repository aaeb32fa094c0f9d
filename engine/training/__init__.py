"""Training around the loop in engine/train.py: from recipe and data to a trained model with results.

Rooms: `setup` (a recipe becomes a job), `job` (the parts of a run, and what happens between two updates), `state`
(windows, updates, counters), `losses`, `optim` (optimizer and schedule), `nonfinite` (NaN and overflow), `unused`
(weights that no gradient reaches), `batch_size` (what fits in memory), `evaluation` (scores of a split), `tracking`
(metrics.jsonl and the trackers), `finish` (final model and results), `report` and `progress` (what people read), `blueprint` (a
model without weights, for dry runs).
"""
