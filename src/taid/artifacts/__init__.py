"""The folder of a run, and how its results are shown. Imports neither torch nor transformers."""
