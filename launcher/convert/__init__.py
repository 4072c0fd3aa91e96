"""Checkpoints of other systems, and conversions between models that compute the same function."""
