"""Plots the losses of a run."""

from pathlib import Path

from colonnade.launcher.train.metrics import read_metrics


def plot_loss(run: Path) -> Path | None:
    """Draws `loss.png` from metrics.jsonl; returns its path, or None without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    rows = read_metrics(run / "metrics.jsonl")
    train = [(r["step"], r["loss"]) for r in rows if r.get("loss") is not None]
    validation = [(r["step"], r["validation_loss"]) for r in rows if "validation_loss" in r]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*train, strict=True), color="#9aa5b1", linewidth=1, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#c0392b", marker="o", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run / "loss.png", dpi=120)
    plt.close(figure)
    return run / "loss.png"
