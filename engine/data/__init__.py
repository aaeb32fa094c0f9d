"""From files of dialogues to batches: rows, prompts, token ids, labels, padding, and which rows make up which update."""
