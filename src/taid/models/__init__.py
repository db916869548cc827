"""Load models and tokenizers by name, match their vocabularies, and generate answers."""
