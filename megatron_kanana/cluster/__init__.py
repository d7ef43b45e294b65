"""Starting a run on this machine or on the nodes of a SLURM cluster."""
