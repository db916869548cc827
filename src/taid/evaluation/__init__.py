"""``taid evaluate``: what a model is worth."""
