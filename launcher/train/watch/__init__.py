"""Lets others watch a run: a heartbeat, metrics for Prometheus, slow ranks, a record of starts."""
