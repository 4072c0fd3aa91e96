"""`plan`: shows a job of any size before it is started.

run    the verb: validates the recipe, and runs one rank of the job without data
table  the report for people
"""
