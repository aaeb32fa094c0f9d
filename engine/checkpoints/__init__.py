"""Checkpoints that are whole or absent: saving, rotation, verification, what may change on a resume."""
