"""From names to models, tokenizers and answers."""
