"""`verify`: checks that a recipe, at test size, trains the same under a layout as in one process.

equal      the rule for "equal", its bounds, and which further differences noise explains
shrink     the recipe at test size
layouts    layouts by name
cases      a layout with the residual wiring and the recomputation under it
cover      the covering set: few cases with every pair of choices
plan       which recipes, cases and precisions: jobs
trace      trains a few steps, and records losses, gradients and parameters
rounding   measures the noise: what rounding alone changes in one process
judgement  equal, equal up to rounding, or not equal
run        the verb: starts ranks, trains the reference, compares
table      the report for people
matrix     the report of all families as a table in Markdown
"""
