"""The fault matrix: what may happen to a run, and that it ends with the same adapter anyway."""
