"""Converts Hugging Face folders, configs and weights, in both directions."""
