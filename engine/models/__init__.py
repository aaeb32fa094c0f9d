"""Models: where they come from, what they are made of, and the folders they are saved as.

bundle         a model with its tokenizer, prompt and lengths; how that is saved
build          a model for training, as a recipe describes it
load           a trained model, for prediction
hub            hub ids and folders, checked before anything of them is loaded; what identifies a model
configuration  a model's configuration, held against recipe and tokenizer
pickled        old pickled weights, read once into a safetensors copy
trial          a short dialogue through a model that was just loaded
tokenization   tokenizers and their added tokens
weights        weights in and out of models, embeddings resized
adapters       LoRA and QLoRA by peft, rows of added tokens
sharding       a model spread over all ranks, and whole again
size           whether a configuration's weights fit this machine, before any is made

What is known of each family stands in `engine/families.py`.
"""
