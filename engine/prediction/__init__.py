"""From a trained model and dialogues to summaries, in evaluation, in engine/predict.py and in the Python API.

Rooms: `summarizer` (prompts to texts, in batches, over ranks), `constraints` (which scripts may be written),
`postprocess` (repairs of texts), `predictor` (the Python
API), `files` (input, output, scores), `submission` (a competition's format), `partial` (what an interrupted prediction keeps),
`shards` (a prediction in parts, and their merge).
"""
