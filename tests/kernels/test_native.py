"""Compiling kernels at first use: once, by several processes at once, and not at all."""

import ctypes
import shlex
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from ranks import preloaded_context

from colonnade.kernels.native import NativeError, compile_source
from colonnade.launcher.cluster.compiler import cpp_compiler

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def compiler(tmp_path: Path) -> str:
    """A compiler that takes a while and writes down its arguments."""
    real = cpp_compiler()
    if real is None:
        pytest.skip("no C++ compiler")
    path = tmp_path / "compiler"
    log, real = shlex.quote(str(tmp_path / "log")), shlex.quote(str(shutil.which(real)))
    path.write_text(f'#!/bin/sh\necho "$@" >> {log}\nsleep 0.2\nexec {real} "$@"\n')
    path.chmod(0o755)
    return str(path)


def compilations(log: Path) -> int:
    return log.read_text().count("-shared")


def test_a_source_is_compiled_once(tmp_path: Path, source: Path, compiler: str) -> None:
    folder = tmp_path / "libraries" / "below"
    library = compile_source(source, folder, compiler)
    assert ctypes.CDLL(str(library)).answer() == 42
    assert compile_source(source, folder, compiler) == library
    assert compilations(tmp_path / "log") == 1
    source.write_text(SOURCE.replace("42", "43"))
    other = compile_source(source, folder, compiler)
    assert ctypes.CDLL(str(other)).answer() == 43
    assert compilations(tmp_path / "log") == 2
    assert set(folder.iterdir()) == {library, other}


def test_another_processor_has_another_library(tmp_path: Path, source: Path, compiler: str) -> None:
    """One that lacks an instruction set, in a folder that both machines share."""
    library = compile_source(source, tmp_path, compiler)
    text = Path(compiler).read_text()
    Path(compiler).write_text(text.replace('"$@"\n', '"$@" -DONE_MORE\n'))
    assert compile_source(source, tmp_path, compiler) != library


def test_compilers_without_march_take_mcpu(tmp_path: Path, source: Path, compiler: str) -> None:
    """As Clang for ARM did for long."""
    text = Path(compiler).read_text()
    refusal = 'case "$*" in *-march=*) echo "unknown -march" >&2; exit 1; esac\nexec'
    Path(compiler).write_text(text.replace("exec", refusal))
    library = compile_source(source, tmp_path / "libraries", compiler)
    assert ctypes.CDLL(str(library)).answer() == 42


def test_processes_compile_at_once(tmp_path: Path, source: Path, compiler: str) -> None:
    """Each until the first has renamed its file; all load the same."""
    folder = tmp_path / "libraries"
    work = partial(compile_source, source, folder, compiler)
    with ProcessPoolExecutor(2, preloaded_context()) as pool:
        futures = [pool.submit(work) for _ in range(2)]
        libraries = {future.result() for future in futures}
    assert compilations(tmp_path / "log") == 2
    assert set(folder.iterdir()) == libraries
    (library,) = libraries
    assert ctypes.CDLL(str(library)).answer() == 42


def test_no_compiler_is_one_sentence(tmp_path: Path, source: Path) -> None:
    with pytest.raises(NativeError, match=r"^the C\+\+ compiler 'no-such' is not installed$"):
        compile_source(source, tmp_path, "no-such")
    with pytest.raises(NativeError, match=r"^the C\+\+ compiler '/' does not run$"):
        compile_source(source, tmp_path, "/")
    with pytest.raises(NativeError, match=r"'false' fails: exit status 1, no message$"):
        compile_source(source, tmp_path, "false")


def test_a_failure_has_the_compilers_first_line(
    tmp_path: Path, source: Path, compiler: str
) -> None:
    source.write_text("int f() { return unknown; }\n")
    with pytest.raises(NativeError, match=r"compiler' fails: .*answer\.cpp") as raised:
        compile_source(source, tmp_path / "libraries", compiler)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "libraries").iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path, source: Path, compiler: str) -> None:
    with pytest.raises(OSError, match="answer"):
        compile_source(source, source, compiler)
