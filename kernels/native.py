"""Compiles C++ sources of this package at first use, without headers of PyTorch or Python, into
shared libraries that ctypes loads. A library is kept under a name that its source, the compiler and
the processor determine."""

import hashlib
import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

# Operations are rounded as IEEE 754 says, each by itself, so that all processors compute the same;
# sqrt sets no errno, which would keep its loop from being vectorised.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC")
PROCESSORS = ("-march=native", "-mcpu=native")  # x86 and newer ARM compilers; other ARM compilers


class NativeError(RuntimeError):
    """A native operator is not available; the message says why, in one sentence."""


def compile_source(source: Path, folder: Path, compiler: str) -> Path:
    """Compiles `source` for this processor, unless an earlier call has.

    Ranks may do so at once: each writes a file of its own, and renames it.

    Args:
        folder: of compiled libraries, which is created.
        compiler: a C++ compiler with the options of GCC and Clang, by name or path.

    Returns:
        The path of the shared library.

    Raises:
        NativeError: the compiler is missing or fails.
        OSError: the folder cannot be written.
    """
    flags, macros = _flags_and_macros(compiler)
    key = hashlib.blake2b(digest_size=8)
    for fact in (source.read_bytes(), " ".join((compiler, *flags)).encode(), macros):
        key.update(hashlib.blake2b(fact).digest())
    library = folder / f"{source.stem}-{key.hexdigest()}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(".so", f"{source.stem}-", folder)
    os.close(handle)
    try:
        _run(compiler, *flags, "-shared", str(source), "-o", temporary)
        os.replace(temporary, library)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    return library


def _flags_and_macros(compiler: str) -> tuple[tuple[str, ...], bytes]:
    """The flags for this processor, and what the compiler predefines with them: its version, and
    every instruction set that it may use."""
    failures = []
    for processor in PROCESSORS:
        flags = (*FLAGS, processor)
        try:
            return flags, _run(compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull)
        except NativeError as failure:
            failures.append(failure)
    raise failures[0]


def _run(compiler: str, *arguments: str) -> bytes:
    """Runs the compiler, and returns what it prints."""
    try:
        finished = subprocess.run([compiler, *arguments], capture_output=True)
    except OSError as error:
        reason = "is not installed" if isinstance(error, FileNotFoundError) else "does not run"
        raise NativeError(f"the C++ compiler {compiler!r} {reason}") from error
    if finished.returncode:
        lines = finished.stderr.decode(errors="replace").splitlines()
        stated = (line.strip() for line in lines if line.strip())
        first = next(stated, f"exit status {finished.returncode}, no message")
        raise NativeError(f"the C++ compiler {compiler!r} fails: {first}")
    return finished.stdout
