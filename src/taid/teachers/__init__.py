"""One interface, wherever the teacher is."""
