"""Rules across the fields of a recipe, one file for each part of it, run by `validate.py`.

A rule says what several fields, or the fields and the number of ranks, must satisfy together.
"""
