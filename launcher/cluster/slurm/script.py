"""Renders scripts for sbatch from the templates in `slurm/`, or from one of the user."""

import difflib
import re
import shlex
from importlib import resources
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined, TemplateError

from colonnade.launcher.cluster.slurm.options import JobOptions
from colonnade.launcher.errors import UserError

SUFFIX = ".sbatch"
PLAIN = r"[\w@%+=:,./\[\]-]+"  # what needs no quotation marks in a line of #SBATCH


def template_names() -> list[str]:
    """Returns the names of the templates that come with the package, sorted."""
    names = (file.name for file in resources.files("colonnade.slurm").iterdir())
    return sorted(name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX))


def render(template: str, job: JobOptions) -> str:
    """Returns the script of a job.

    Args:
        template: the name of a template, or the path of the user's own, which may include the
            shared pieces as well, such as `_header.sh`.
        job: what the template is filled with, as `job`.

    Raises:
        UserError: there is no such template, or it is not sound.
    """
    environment = Environment(
        loader=FunctionLoader(_shared), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters |= {"quote": lambda value: shlex.quote(str(value)), "option": option}
    try:
        return environment.from_string(_source(template)).render(job=job)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        place = f", line {line}" if line else ""
        raise UserError(f"--template {template}{place}: {error.message}") from None


def option(value: object) -> str:
    """Returns a value of an option as a line of #SBATCH takes it."""
    text = str(value)
    return text if re.fullmatch(PLAIN, text) else f'"{text}"'


def _shared(name: str) -> str | None:
    """Returns the text of a file of `slurm/`; None if there is none of this name."""
    file = resources.files("colonnade.slurm").joinpath(name)
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _source(template: str) -> str:
    """Returns the text of a template."""
    if template in template_names():
        return _shared(f"{template}{SUFFIX}") or ""
    try:
        return Path(template).read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(template, template_names(), 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"--template {template}: there is no such file and no template of that name; {hint}"
            f"give the path of a file or one of {', '.join(template_names())}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"--template {template}: {reason}") from None
