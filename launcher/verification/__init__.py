"""`verify`: a recipe, shrunk to test size, trains alike under a layout and in one process.

equal      the rule for "equal", and its bounds
shrink     the recipe at test size
layouts    layouts by name, and the covering set
trace      a few steps, and all that they leave behind
run        the verb: ranks, reference, comparison
table      the report for people
"""
