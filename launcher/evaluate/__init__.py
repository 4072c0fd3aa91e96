"""Evaluates trained models: the loss of whole sources, and tasks of lm-evaluation-harness.

rows     all rows of a source, the last, shorter one included
run      the verb `eval`
scoring  log-likelihoods and completions, as tasks ask for them
harness  our models for lm-evaluation-harness, where it is installed
tasks    its tasks
"""
