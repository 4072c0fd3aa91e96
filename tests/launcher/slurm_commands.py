"""Stand-ins for SLURM's commands, for tests without SLURM."""

import os
from pathlib import Path

SBATCH = """#!/bin/sh
[ -f "{folder}/refusal" ] && {{ cat "{folder}/refusal" >&2; exit 1; }}
echo "$@" >>"{folder}/submitted"
echo "$((100 + $(wc -l <"{folder}/submitted")))"
"""
SCONTROL = """#!/bin/sh
for last; do :; done
echo "$@" >>"{folder}/asked"
[ -f "{folder}/job-$last" ] && {{ cat "{folder}/job-$last"; exit 0; }}
echo "slurm_load_jobs error: Invalid job id specified" >&2
exit 1
"""


class SlurmCommands:
    """`sbatch` and `scontrol` in a folder on PATH: the first counts jobs from 101, the second knows
    the jobs that a test tells of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL)):
            (folder / name).write_text(text.format(folder=folder), encoding="utf-8")
            (folder / name).chmod(0o755)

    def know(self, job: str, script: Path | str, **fields: str) -> None:
        """Tells scontrol of a job of a script."""
        record = {"JobId": job.partition("_")[0], "JobState": "RUNNING", "Reason": "None"}
        if "_" in job:
            record |= dict(zip(("ArrayJobId", "ArrayTaskId"), job.split("_"), strict=True))
        record |= {"Restarts": "0", "NodeList": "n[1-2]", **fields, "Command": str(script)}
        text = " ".join(f"{name}={value}" for name, value in record.items())
        new = self.folder / "new"
        new.write_text(f"{text} \n", encoding="utf-8")
        os.replace(new, self.folder / f"job-{job}")

    def forget(self, job: str) -> None:
        """Lets scontrol forget a job."""
        (self.folder / f"job-{job}").unlink()

    def refuse(self, message: str) -> None:
        """Lets sbatch refuse all jobs."""
        (self.folder / "refusal").write_text(message, encoding="utf-8")

    @property
    def submitted(self) -> list[str]:
        """The arguments of each call of sbatch."""
        path = self.folder / "submitted"
        return path.read_text().splitlines() if path.exists() else []
