"""`train`: the run's folder, the loop over steps, schedules, and what a run reports."""
