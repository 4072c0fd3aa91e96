"""Writes a safetensors file durably."""

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from colonnade.launcher.checkpoint.folders import fsync
from colonnade.launcher.checkpoint.manifest import FileRecord, checksums


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> FileRecord:
    """Writes tensors, which share no memory, to a file, and waits until it is on the disk.

    Returns:
        the record of the file, which is read again for it.

    Raises:
        OSError: with its errno, where the disk refuses.
    """
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        raise os_error(error, path) from error
    # safetensors creates the file readable by its owner only; give it the permissions of its
    # folder, so that a team can share checkpoints.
    path.chmod(path.parent.stat().st_mode & 0o666)
    fsync(path)
    return checksums(path)


def os_error(error: SafetensorError, path: Path) -> OSError:
    """Converts an error to an OSError; safetensors gives the errno only in its message's text."""
    match = re.search(r"os error (\d+)", str(error))
    if match is None:
        return OSError(errno.EIO, str(error), str(path))
    return OSError(int(match[1]), os.strerror(int(match[1])), str(path))
