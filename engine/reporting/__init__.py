"""What a run writes down for people and trackers while it goes on and when it has ended.

Rooms: `tracking` (metrics.jsonl, TensorBoard and W&B, prediction files), `callbacks` (hooks of the user's), `provenance` (what
a result comes from) and `report` (the lines at the end).
"""
