"""The process around a run: device, ranks, signals, exit codes, run folder, log, lock, atomic writes."""
