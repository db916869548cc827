"""Compare methods x seeds of one recipe with equal tuning: ``taid compare``."""
