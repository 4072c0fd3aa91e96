"""`train`: the run's folder, the loop over steps, schedules, metrics and other reports."""
