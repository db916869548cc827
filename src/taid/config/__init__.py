"""Everything that a run can be told."""
