"""What is minimised, and how t moves."""
