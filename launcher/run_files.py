"""Names of the files in a run's folder."""

RECIPE = "recipe.toml"
COMING = "recipe.coming.toml"  # the new recipe of a resumed run, until its checkpoint is loaded
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
LOCK = ".lock"  # names the job that trains the run
FAILURES = "failures"  # records of ranks that failed, a folder for each attempt
LOGS = "logs"  # the output of ranks but the first, a folder for each attempt
SAVE = "save"  # asks the run for a checkpoint; rank 0 deletes it
