"""The record of a submitted run, `job.json` in its folder: which jobs of SLURM train it."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from colonnade.launcher.cluster.slurm.client import JOB_ID
from colonnade.launcher.errors import UserError
from colonnade.launcher.run_files import JOB


@dataclass(frozen=True)
class JobRecord:
    """The newest submission of a run.

    Attributes:
        jobs: the numbers of the jobs; several in a chain.
        template: the name of the template, or its path.
        submitted: when, in Unix seconds.
        nodes: the number of nodes.
        ranks: the number of ranks.
        points: of a sweep: the overrides of each of its runs, which have folders 0, 1, ….
    """

    jobs: list[str]
    template: str
    submitted: int
    nodes: int
    ranks: int
    points: list[list[str]]

    def write(self, run: Path) -> None:
        """Writes the record into the run's folder. Raises OSError."""
        (run / JOB).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def trained(self, run: Path) -> list[tuple[str, Path]]:
        """Returns each job with the folder of the run that it trains."""
        if not self.points:
            return [(job, run) for job in self.jobs]
        return [
            (f"{job}_{index}", run / str(index))
            for job in self.jobs
            for index in range(len(self.points))
        ]


def read_record(run: Path) -> JobRecord | None:
    """Returns the record of a run; None if it was not submitted.

    Raises:
        UserError: the file is no record.
    """
    try:
        fields = json.loads((run / JOB).read_text(encoding="utf-8"))
        return JobRecord(**fields)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError):
        raise UserError(f"{run / JOB}: not a record of `submit`; remove it") from None


def submitted_runs(runs: Path) -> Iterator[tuple[Path, JobRecord]]:
    """Yields the folders below `runs` that were submitted, with their records, oldest first."""
    records = ((path.parent, read_record(path.parent)) for path in runs.glob(f"*/{JOB}"))
    known = [(run, record) for run, record in records if record is not None]
    yield from sorted(known, key=lambda pair: (pair[1].submitted, pair[0]))


def is_number(target: str) -> bool:
    """Whether a word is the number of a job, and no folder."""
    return re.fullmatch(JOB_ID, target) is not None and not Path(target).is_dir()
