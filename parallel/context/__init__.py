"""Context parallelism: one sequence over many ranks, through every sub-block.

layout     which segments of a sequence a rank holds, and where their neighbours are
hops       segments' tensors on their way to other ranks
ring       attention: keys and values go round
gathered   attention: every rank gathers all keys and values
heads      attention and recurrences: ranks exchange their parts of the sequence for heads
states     recurrences: states are handed on between segments
halo       convolutions: a segment's first taps reach into the one before
plug       all of that put into a model
"""
