"""Ranks on hosts: reads the environment, starts and prepares ranks, handles signals; `doctor`."""
