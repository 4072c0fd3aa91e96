"""`plan`: shows a job of any size before it is started.

run    the verb: validates the recipe, runs one rank of the job, and reports
rank   the rank's program: builds it as training does, and runs it without data
fit    what fits a device, and the nearest layouts that do
table  the report for people
"""
