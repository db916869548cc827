"""The command line: words, and exit status."""
