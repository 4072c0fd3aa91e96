"""A recipe: its tables, how it is read, what is valid, and what has no effect."""
