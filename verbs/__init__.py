"""The verbs of the command line as functions.

>>> from colonnade import train
>>> run = train("quickstart", ["train.steps=20"], nproc=2)  # doctest: +SKIP
>>> run.losses[-1]  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colonnade.launcher.cluster.doctor import doctor as doctor
    from colonnade.launcher.data import data as data
    from colonnade.launcher.evaluate.run import evaluate as evaluate
    from colonnade.launcher.generate import generate as generate
    from colonnade.launcher.inspect.run import inspect as inspect
    from colonnade.launcher.jobs.logs import logs as logs
    from colonnade.launcher.jobs.status import status as status
    from colonnade.launcher.jobs.submit import submit as submit
    from colonnade.launcher.plan.run import plan as plan
    from colonnade.launcher.recipe.load import load_recipe as load_recipe
    from colonnade.launcher.train.run import resume as resume
    from colonnade.launcher.train.run import train as train
    from colonnade.launcher.verify.run import verify as verify
    from colonnade.launcher.weights.convert import convert as convert

_MODULES = {
    "convert": "launcher.weights.convert",
    "data": "launcher.data",
    "doctor": "launcher.cluster.doctor",
    "evaluate": "launcher.evaluate.run",
    "generate": "launcher.generate",
    "inspect": "launcher.inspect.run",
    "logs": "launcher.jobs.logs",
    "load_recipe": "launcher.recipe.load",
    "plan": "launcher.plan.run",
    "status": "launcher.jobs.status",
    "submit": "launcher.jobs.submit",
    "resume": "launcher.train.run",
    "train": "launcher.train.run",
    "verify": "launcher.verify.run",
}
__all__ = [
    "convert", "data", "doctor", "evaluate", "generate", "inspect", "load_recipe", "logs", "plan",
    "resume", "status", "submit", "train", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports a verb on first access, so that `colonnade --help` does not wait for torch."""
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
