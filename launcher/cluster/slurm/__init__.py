"""SLURM: scripts from templates, its commands, and the order of nodes along switches."""
