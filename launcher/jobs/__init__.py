"""Jobs of SLURM that train runs: `submit`, `status`, `logs`, and what follows after a job's end."""
