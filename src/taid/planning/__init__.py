"""``taid plan`` and ``--dry_run``: what a run will take."""
