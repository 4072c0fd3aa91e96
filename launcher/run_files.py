"""Names of the files in a run's folder."""

RECIPE = "recipe.toml"
COMING = "recipe.coming.toml"  # the new recipe of a resumed run, until its checkpoint is loaded
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
ENVIRONMENT = "environment.jsonl"  # a line for every start of the run
HEARTBEAT = "heartbeat.json"  # replaced while the run makes progress
LOCK = ".lock"  # names the job that trains the run
JOB = "job.json"  # what was submitted to SLURM, and the numbers of the jobs
JOB_SCRIPT = "job.sbatch"  # the script that was submitted
JOB_ENDS = "job_ends.jsonl"  # a line for every start of such a job that has ended
HOSTS = "hosts.txt"  # the host of each task of such a job
FAILURES = "failures"  # records of ranks that failed, a folder for each attempt
LOGS = "logs"  # the output of ranks but the first, a folder for each attempt
SAVE = "save"  # asks the run for a checkpoint; rank 0 deletes it


def job_log(number: str) -> str:
    """The output of a job of SLURM, by its number."""
    return f"slurm-{number}.out"
