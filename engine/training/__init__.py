"""What the loop in `engine/train.py` works with: setting up, losses, optimizers, evaluation, logs, and the end of a run."""
