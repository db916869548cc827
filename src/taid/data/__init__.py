"""Load data, from a file to a batch."""
