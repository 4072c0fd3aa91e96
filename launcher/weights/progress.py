"""The folder of a conversion that is not finished, and its finished files."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from colonnade.launcher.checkpoint.folders import fsync, write_durably
from colonnade.launcher.checkpoint.manifest import FileRecord
from colonnade.launcher.errors import UserError
from colonnade.launcher.weights.direct import checksums
from colonnade.launcher.weights.target import Piece, Target

PROGRESS = "convert.json"


class Progress:
    """The folder of a conversion that is not finished, and its finished files.

    Attributes:
        folder: `DESTINATION.coming`.
        tensors: the folder in it with the files of tensors.
        identity: of the conversion.
        files: that are finished, by name.
    """

    def __init__(
        self, folder: Path, place: str, identity: dict[str, Any], files: dict[str, FileRecord]
    ) -> None:
        self.folder, self.tensors = folder, folder / place
        self.identity, self.files = identity, files

    @classmethod
    def open(cls, destination: Path, identity: dict[str, Any], place: str = "") -> "Progress":
        """Makes the folder, or goes on with that of an earlier call; `place` is that of the files
        of tensors in it.

        Raises:
            UserError: it is of another conversion, or cannot be made.
        """
        folder = destination.with_name(f"{destination.name}.coming")
        try:
            (folder / place).mkdir(parents=True, exist_ok=True)
            known = folder / PROGRESS
            if not known.exists():
                return cls(folder, place, identity, {})
            content = json.loads(known.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"convert: {folder} cannot be used ({error}); remove it") from error
        if content.get("identity") != identity:
            raise UserError(
                f"convert: {folder} holds a part of another conversion, or its source has changed; "
                "remove it, or name another folder"
            )
        found = {n: FileRecord.model_validate(r) for n, r in content["files"].items()}
        kept = {n: r for n, r in found.items() if (folder / place / n).exists()}
        return cls(folder, place, identity, kept)

    def part(self, name: str) -> Path:
        """Returns the path at which a file is written until it is finished."""
        return self.tensors / f"{name}.part"

    def add(self, name: str, record: FileRecord) -> None:
        """Takes a file that is on the disk: checks it, and records it."""
        self.part(name).rename(self.tensors / name)
        self.files[name] = record
        self.check(name)
        self.save()

    def check(self, name: str) -> None:
        """Reads a file again, from the disk; raises UserError if it is not what was written."""
        path = self.tensors / name
        if checksums(path) != self.files[name]:
            del self.files[name]
            self.save()
            raise UserError(
                f"convert: {path} is not what was written; check the disk, and repeat the call, "
                "which writes it again"
            )

    def refused(self, error: OSError) -> UserError:
        """Returns the error for a disk that refuses."""
        return UserError(
            f"convert: cannot write in {self.folder}: {error.strerror}; free space, then repeat "
            "the call, which goes on behind the finished files"
        )

    def save(self) -> None:
        """Writes the record of the finished files."""
        files = {name: record.model_dump(mode="json") for name, record in self.files.items()}
        content = json.dumps({"identity": self.identity, "files": files})
        new = self.folder / f"{PROGRESS}.new"
        write_durably(new, content)
        os.replace(new, self.folder / PROGRESS)

    def complete(self, target: Target, files: Mapping[str, Sequence[Piece]]) -> None:
        """Writes what comes with the tensors' files."""
        try:
            target.finish(self.folder, files, self.files)
        except OSError as error:
            raise self.refused(error) from error

    def rename(self, destination: Path) -> None:
        """Gives the folder its name."""
        try:
            (self.folder / PROGRESS).unlink()
            for part in self.tensors.glob("*.part"):
                part.unlink()
            fsync(self.tensors)
            fsync(self.folder)
            self.folder.rename(destination)
            fsync(destination.absolute().parent)
        except OSError as error:
            raise self.refused(error) from error
