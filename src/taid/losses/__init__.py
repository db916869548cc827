"""The losses that a student minimises, and the schedules that move their targets."""
