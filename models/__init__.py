"""The systems, one folder each: what is particular to it, nothing else."""
