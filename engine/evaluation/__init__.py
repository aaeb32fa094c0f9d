"""Scores of a split of the data.

Rooms: `evaluate` (decoded, scored and sharded over ranks) and `extras` (metrics and callbacks of the user's).
"""
