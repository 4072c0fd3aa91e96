"""The command line: `colonnade VERB`. Exits 0 on success, 2 on a user's mistake, 1 otherwise.

parser  verbs and options
jobs    those of SLURM's jobs
verbs   what each verb does
report  reports as text or JSON
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence

from colonnade.launcher.cli.parser import RANK, parse
from colonnade.launcher.cli.report import reporting
from colonnade.launcher.cluster.environment import (
    USER_MISTAKE,
    RankEnvironment,
    report_failure,
    write_error_file,
)
from colonnade.launcher.console import tolerate_closed_streams
from colonnade.launcher.errors import ReportedError, UserError

# Seconds before a rank reports an exception. If another rank failed first and broke the connection,
# the launcher reports that rank's error and ends this one in the meantime.
GRACE_PERIOD = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit status."""
    with tolerate_closed_streams():
        parsed = parse(arguments)
        with reporting(getattr(parsed, "json", None)) as parsed.report:
            status = run(parsed)
        if status and is_one_of_several_ranks():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # skips clean-up, which could wait for ranks in a collective
    return status


def run(parsed: argparse.Namespace) -> int:
    """Runs a verb; turns exceptions into an exit status and a message."""
    try:
        return parsed.action(parsed)
    except UserError as mistake:
        report_failure(str(mistake), started=parsed.verb == RANK)
        return USER_MISTAKE
    except ReportedError as error:
        write_error_file(error.cause)
        return error.status
    except KeyboardInterrupt:
        if parsed.verb != RANK:
            print("\ncolonnade: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception:  # an error of this rank, or the consequence of another rank's failure
        if not is_one_of_several_ranks():
            raise
        time.sleep(GRACE_PERIOD)
        sys.excepthook(*sys.exc_info())
        return 1


def is_one_of_several_ranks() -> bool:
    """Whether this process is one of several ranks."""
    try:
        rank_env = RankEnvironment.from_environment()
    except UserError:  # was reported already
        return False
    return rank_env is not None and rank_env.size > 1
