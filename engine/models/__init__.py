"""Models, tokenizers and adapters: where they come from, what may be loaded, how they are built, how much memory they need."""
