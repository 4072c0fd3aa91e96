"""`inspect`: shows what a checkpoint holds, checks its files, and compares two.

contents  the content of a checkpoint, of a run's newest one, or of a Hugging Face folder
run       the verb: reports on one, or compares two
table     the report for people
"""
