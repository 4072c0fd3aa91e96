"""Ranks on hosts: what the environment says, how ranks are started and end, `doctor`."""
