"""Training around the loop in engine/train.py: from recipe and data to a trained model with results.

Rooms: `setup` (a recipe becomes a job), `job` (the parts of a run, and what happens between two updates), `state`
(windows, updates, counters), `optim` (optimizer and schedule), `nonfinite` (NaN and overflow), `unused` (weights that no
gradient reaches), `distribution` (how ranks hold the model), `memory` and `batch_size` (what fits), `profiling` (where the
time goes), `progress` (what people watch), `finish` (final model and results), `blueprint` (a model without weights, for dry
runs).
"""
