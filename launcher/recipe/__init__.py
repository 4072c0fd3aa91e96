"""Recipes: their tables, reading and writing, validity rules, unused settings and hints."""
