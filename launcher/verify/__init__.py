"""`verify`: a recipe, shrunk to test size, trains alike under a layout and in one process.

equal      the rule for "equal", its bounds, and what noise explains beyond them
shrink     the recipe at test size
layouts    layouts by name, and the covering set
trace      a few steps, and all that they leave behind
rounding   the noise: what rounding alone does, measured in one process
judgement  equal, equal up to rounding, or not equal
run        the verb: ranks, reference, comparison
table      the report for people
"""
