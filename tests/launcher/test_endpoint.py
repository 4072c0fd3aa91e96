"""Metrics over HTTP: the text that Prometheus reads, its address, a port in use, its end."""

import http.client
import io
import math
import re
import socket
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pytest
import torch
from ranks import Ranks

from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.load import dump_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.events import read_events
from colonnade.launcher.train.loop import run_job
from colonnade.launcher.train.monitor import Monitor
from colonnade.launcher.train.watch.endpoint import Metrics, serving
from colonnade.parallel.world import World

# A line of the format, as its documentation has it
SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)\{((?:[a-zA-Z_]\w*="(?:\\[\\n"]|[^\\"\n])*",?)*)\} (\S+)')


def parsed(text: str) -> dict[str, dict[str, float]]:
    """The values of the text by metric, and by labels; each metric has its help and type first."""
    values: dict[str, dict[str, float]] = {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split()[2]
            assert name not in values
            values[name] = {}
        elif line.startswith("# TYPE "):
            assert line.split()[2:] == [name, "gauge"]
        else:
            found = SAMPLE.fullmatch(line)
            assert found is not None, line
            assert found[1] == name
            values[name][found[2]] = float(found[3])
    return values


def test_the_text_of_metrics() -> None:
    metrics = Metrics('a "quoted\\ run', "tiny")
    metrics.update({"step": 3, "loss": None, "tokens_per_s": 1.5e-7, "parts": {"data": 0.25}})
    metrics.update({"step": 4, "loads": {"3": [1, 2]}, "slowest_host": "n1", "validation_loss": 2})
    metrics.update({"largest-share": {"3": 0.5, "5": 0.75}})
    values = parsed(metrics.text())
    labels = 'run="a \\"quoted\\\\ run",recipe="tiny"'
    assert values.pop("colonnade_last_record_timestamp_seconds")[labels] > 1.7e9
    assert math.isnan(values.pop("colonnade_loss")[labels])
    assert values == {
        "colonnade_step": {labels: 4},
        "colonnade_tokens_per_second": {labels: 1.5e-7},
        "colonnade_step_part_seconds": {f'{labels},of="data"': 0.25},
        "colonnade_validation_loss": {labels: 2},
        "colonnade_largest_share": {f'{labels},of="3"': 0.5, f'{labels},of="5"': 0.75},
    }


def test_it_answers_until_it_is_closed() -> None:
    metrics = Metrics("run", "tiny")
    metrics.update({"step": 1})
    with serving(metrics, "127.0.0.1", 0) as url:
        with urlopen(url, timeout=10) as answer:
            assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            assert parsed(answer.read().decode())["colonnade_step"]
        with pytest.raises(HTTPError, match="404"):
            urlopen(url.replace("metrics", "secrets"), timeout=10)
        host, port = re.fullmatch(r"http://(.+):(\d+)/metrics", url).groups()  # type: ignore[union-attr]
        # a client that says nothing delays nobody, nor the end
        silent = socket.create_connection((host, int(port)))
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        connection.request("GET", "/metrics")
        assert connection.getresponse().status == 200
    with pytest.raises(URLError):
        urlopen(url, timeout=10)
    silent.close()


def test_it_is_bound_to_loopback_unless_told_otherwise() -> None:
    assert Recipe().monitor.metrics_port is None
    assert Recipe().monitor.metrics_host == "127.0.0.1"


def job(rank: int, size: int, recipe: Recipe, run: Path) -> tuple[str, list[str], str]:
    """Runs a job; returns its error, what was served after each step, and what it printed."""
    if rank == 0:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "recipe.toml").write_text(dump_recipe(recipe))
    record, served = Monitor.record, []

    def read_after(monitor: Monitor, row: dict) -> None:
        record(monitor, row)
        url = re.search(r"http://\S+", printed.getvalue())
        assert url is not None
        with urlopen(url[0], timeout=10) as answer:
            served.append(answer.read().decode())

    Monitor.record = read_after  # type: ignore[method-assign]
    try:
        with redirect_stdout(io.StringIO()) as printed:
            run_job(recipe, run, World(rank, size, torch.device("cpu")))
    except UserError as error:
        return str(error), served, printed.getvalue()
    finally:
        Monitor.record = record  # type: ignore[method-assign]
    return "", served, printed.getvalue()


def test_metrics_of_a_run(ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = recipe("monitor.metrics_port=0", "train.steps=2", "train.validate_rows=0")
    (error, served, printed), (_, nothing, silence) = ranks2.run(job, settings, run)
    assert (error, nothing, silence) == ("", [], "")
    assert "metrics     http://127.0.0.1:" in printed
    labels = 'run="run",recipe="tiny"'
    first, second = map(parsed, served)
    assert first["colonnade_step"] == {labels: 1}
    assert second["colonnade_step"] == {labels: 2}
    assert second["colonnade_attempt"] == {labels: 1}
    assert second["colonnade_tokens_per_second"][labels] > 0
    assert 3 < second["colonnade_loss"][labels] < 5
    url = re.search(r"http://\S+", printed)
    assert url is not None
    with pytest.raises(URLError):
        urlopen(url[0], timeout=10)


def test_a_port_in_use_is_said_before_training_on_all_ranks(
    ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        results = ranks2.run(job, recipe(f"monitor.metrics_port={port}"), tmp_path)
    (message,) = {error for error, _, _ in results}
    assert message.startswith(f"monitor.metrics_port = {port}: cannot serve metrics on 127.0.0.1")
    assert "in use" in message
    (event,) = read_events(tmp_path)
    assert (event["event"], event["reason"], event["message"]) == ("stop", "error", message)


def test_an_address_of_another_host_is_refused() -> None:
    with (
        pytest.raises(UserError, match=r"cannot serve metrics on 192\.0\.2\.1: .*metrics_host"),
        serving(Metrics("run", "tiny"), "192.0.2.1", 0),
    ):
        pass
