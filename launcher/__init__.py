"""A recipe becomes a running job. `colonnade` itself has its verbs as functions."""
