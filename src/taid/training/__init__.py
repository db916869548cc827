"""The main path: from a configuration to a trained student."""
