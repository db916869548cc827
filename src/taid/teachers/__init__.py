"""Ask a teacher through one interface, whether it is a local model, a server or a cache."""
