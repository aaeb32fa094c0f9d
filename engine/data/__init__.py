"""Data: from a file of dialogues to batches of token ids.

files    read a data file: CSV, JSONL, JSON or parquet to records
rows     records to checked examples; overlap between splits
prompts  the text that the model reads, and decoded text back to a summary
encode   examples to token ids and labels, truncated where they are too long
collate  features to padded batches
windows  which rows make up which update
vocabulary  a tokenizer trained on the dialogues, for a model that starts from nothing
"""
