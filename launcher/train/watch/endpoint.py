"""Serves the last metrics of a run over HTTP, as text that Prometheus reads.

https://prometheus.io/docs/instrumenting/exposition_formats/ defines the format, version 0.0.4.
"""

import math
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from colonnade.launcher.errors import UserError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Names of metrics.jsonl that are called otherwise, or need words; others keep their names.
NAMES = {
    "step": ("step", "Completed optimizer steps."),
    "loss": ("loss", "Training loss of the last step, nats per token."),
    "validation_loss": ("validation_loss", "Loss of the last validation, nats per token."),
    "grad_norm": ("grad_norm", "Norm of all gradients, before clipping."),
    "lr": ("learning_rate", "Learning rate of the last step."),
    "tokens": ("step_tokens", "Tokens of the last step on all ranks."),
    "tokens_per_s": ("tokens_per_second", "Tokens per second of the last step on all ranks."),
    "seconds": ("step_seconds", "Seconds of the last step."),
    "parts": ("step_part_seconds", "Seconds of the last step's parts on the host of rank 0."),
    "memory_gib": ("memory_gib", "Peak memory of rank 0 in GiB."),
    "mfu": ("mfu", "Model FLOPs of the last step over the devices' peak."),
    "working_seconds": ("rank_working_seconds", "The ranks' own working seconds of a step."),
    "slowest_rank": ("slowest_rank", "The rank that works longest."),
    "attempt": ("attempt", "Number of this start of the run."),
    "time": ("last_record_timestamp_seconds", "When metrics were last recorded, in Unix seconds."),
}


class Metrics:
    """The last value of every metric, as text.

    Attributes:
        labels: of every sample.
    """

    def __init__(self, run: str, recipe: str) -> None:
        self.labels = {"run": run, "recipe": recipe}
        self.rows: dict[str, Any] = {}
        self.lock = threading.Lock()

    def update(self, row: dict[str, Any]) -> None:
        """Takes the values of a row of metrics.jsonl; those that it does not have stay."""
        now = {"time": round(time.time(), 3)}
        with self.lock:
            self.rows |= row | now

    def text(self) -> str:
        """Returns all gauges. A value that is not finite is `NaN`; texts and lists are left out."""
        with self.lock:
            rows = dict(self.rows)
        return "".join(self.gauge(name, value) for name, value in rows.items())

    def gauge(self, name: str, value: Any) -> str:
        """Returns the lines of one metric; nothing where it has no number."""
        values = value if isinstance(value, dict) else {None: value}
        samples = {key: number for key, v in values.items() if (number := number_of(v))}
        if not samples:
            return ""
        known, words = NAMES.get(name, (name, f"`{name}` of metrics.jsonl."))
        title = "colonnade_" + re.sub(r"[^a-zA-Z0-9_]", "_", known)
        text = f"# HELP {title} {words}\n# TYPE {title} gauge\n"
        for key, number in samples.items():
            labels = self.labels | ({} if key is None else {"of": str(key)})
            inner = ",".join(f'{label}="{escaped(text)}"' for label, text in labels.items())
            text += f"{title}{{{inner}}} {number}\n"
        return text


def number_of(value: Any) -> str | None:
    """Returns a sample's value as text; None for what is no number. null stands for not finite."""
    if value is None:
        return "NaN"
    if not isinstance(value, int | float):
        return None
    return repr(float(value)) if math.isfinite(value) else "NaN"


def escaped(text: str) -> str:
    """Returns the value of a label as the format has it."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class Handler(BaseHTTPRequestHandler):
    """Answers requests with the text of the server's metrics."""

    server: "Server"
    timeout = 10.0  # seconds until a silent client is left

    def do_GET(self) -> None:
        """Answers a request."""
        if self.path.partition("?")[0] not in ("/", "/metrics"):
            self.send_error(404, "only /metrics is served")
            return
        body = self.server.metrics.text().encode()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing: requests are no news of the run."""


class Server(ThreadingHTTPServer):
    """Serves metrics from threads that end with the process; raises OSError if it cannot."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        self.metrics = metrics
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        self.address_family, address = found[0][0], found[0][4]
        super().__init__(address, Handler)  # type: ignore[arg-type]  # that of IPv6 has four fields

    def server_bind(self) -> None:
        """Binds without asking for the host's name, as `HTTPServer` does, which may take long."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a client that hung up, and prints other errors; the run goes on."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


@contextmanager
def serving(metrics: Metrics, host: str, port: int) -> Iterator[str]:
    """Serves metrics while the block runs, and yields their address, `http://HOST:PORT/metrics`.

    Port 0 stands for a free one.

    Raises:
        UserError: the address cannot be served on, for example because the port is in use.
    """
    try:
        server = Server(metrics, host, port)
    except OSError as error:
        raise UserError(
            f"monitor.metrics_port = {port}: cannot serve metrics on {host}: {error.strerror}; set "
            "it to a free port or to 0, set monitor.metrics_host to an address of rank 0's host, "
            "or leave both out"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
