"""`eval --tasks`: tasks of lm-evaluation-harness, by one process or by ranks."""

import difflib
import importlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from colonnade.launcher.cluster.collective import on_rank_zero
from colonnade.launcher.cluster.environment import RankEnvironment
from colonnade.launcher.cluster.ranks import choose_device, start_ranks
from colonnade.launcher.errors import UserError
from colonnade.launcher.generate.opening import opened, recipe_for
from colonnade.launcher.generate.run import check_layout

ORDER, REPORT = "order.json", "report.json"


@dataclass(frozen=True)
class Order:
    """What is evaluated; JSON can represent it.

    Attributes:
        model: a run, one of its checkpoints, or a Hugging Face folder.
        tasks: names.
        include_path: a folder with other tasks, as YAML files.
        batch: texts that go forward together.
        limit: so many examples of each task; None: all.
        overrides: `field=value`, as for `recipe_for`.
    """

    model: str
    tasks: list[str]
    include_path: str | None = None
    batch: int = 8
    limit: int | None = None
    overrides: tuple[str, ...] = ()


def evaluate_tasks(order: Order, nproc: int = 1) -> dict[str, Any]:
    """Evaluates tasks as the ranks of this job, or on `nproc` that it starts.

    Without an override of [parallel] ranks are tensor parallel.

    Returns:
        the report, on every rank: `results` by task, as the harness gives them.

    Raises:
        UserError: lm_eval is not installed, there is no such task, or the model cannot be read.
    """
    environment = RankEnvironment.from_environment()
    size = environment.size if environment else nproc
    if size > 1 and not any(o.startswith("parallel.") for o in order.overrides):
        order = Order(**{**asdict(order), "overrides": (*order.overrides, f"parallel.tp={size}")})
    if environment is not None or nproc == 1:
        return evaluate_as_rank(order)
    recipe = recipe_for(Path(order.model), order.overrides, nproc)
    check_layout(recipe, nproc)
    choose_device(recipe.train.device, RankEnvironment.on_one_host(0, nproc))
    task_manager(order)
    with tempfile.TemporaryDirectory(prefix="colonnade-eval-") as folder:
        Path(folder, ORDER).write_text(json.dumps(asdict(order)), encoding="utf-8")
        if status := start_ranks(evaluate_as_started_rank, {"folder": folder}, nproc):
            raise SystemExit(status)
        return json.loads(Path(folder, REPORT).read_text(encoding="utf-8"))


def evaluate_as_started_rank(folder: str) -> None:
    """Takes part as a rank that `evaluate_tasks` started; rank 0 writes the report."""
    fields = json.loads(Path(folder, ORDER).read_text(encoding="utf-8"))
    report = evaluate_as_rank(Order(**{**fields, "overrides": tuple(fields["overrides"])}))
    environment = RankEnvironment.from_environment()
    if environment is None or environment.rank == 0:
        Path(folder, REPORT).write_text(json.dumps(report), encoding="utf-8")


def evaluate_as_rank(order: Order) -> dict[str, Any]:
    """Evaluates as one rank; every rank makes the same calls, and has all results."""
    manager = task_manager(order)
    harness = importlib.import_module("colonnade.launcher.evaluate.harness")
    simple_evaluate = importlib.import_module("lm_eval").simple_evaluate
    with opened(Path(order.model), order.overrides, check=check_layout) as trained:
        found = simple_evaluate(
            model=harness.HarnessModel(trained, order.batch),
            tasks=list(order.tasks),
            task_manager=manager,
            limit=order.limit,
            log_samples=False,
        )
        # the harness gives the results to rank 0 alone
        results = on_rank_zero(lambda: json.loads(json.dumps(found["results"], default=str)))
    return {"model": order.model, "results": results}


def task_manager(order: Order) -> Any:
    """Returns the harness's tasks.

    Raises:
        UserError: it is not installed, or lacks one of the tasks.
    """
    try:
        tasks = importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise UserError("eval --tasks needs lm_eval: pip install 'colonnade[eval]'") from error
    if order.include_path is not None and not Path(order.include_path).is_dir():
        raise UserError(f"--include-path {order.include_path}: there is no such folder")
    manager = tasks.TaskManager(include_path=order.include_path)
    for name in order.tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UserError(f"--tasks {name}: lm_eval has no such task{hint}")
    return manager


def table(report: dict[str, Any]) -> str:
    """Returns the report as lines: a task and a metric each."""
    lines = []
    for task, metrics in report["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float) and "_stderr" not in name:
                metric, _, filtered = name.partition(",")
                error = metrics.get(f"{metric}_stderr,{filtered}")
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                lines.append(f"{task:<30} {metric:<24} {value:.6g}{spread}")
    return "\n".join(lines)


def names(text: str) -> Sequence[str]:
    """Returns the names in a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]
