"""Runs whose processes are killed or frozen, beside the run that nobody disturbed."""
