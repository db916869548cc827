"""``taid compare``: methods x seeds of one recipe, tuned alike."""
