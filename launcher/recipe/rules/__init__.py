"""Rules across the fields of a recipe, one file per subject; `validate.py` runs them.

A rule yields a fault where several fields, or fields and the number of ranks, contradict each
other.
"""
