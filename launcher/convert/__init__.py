"""Converts checkpoints of other systems, and models into others that compute the same function."""
