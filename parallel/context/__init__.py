"""Context parallelism: the ranks of the `cp` axis shard a sequence, through every sub-block.

layout     which segments of a sequence a rank holds, and which rank holds a segment
p2p        send/recv of segments: around the ring, or to the rank of the next segment
ring       attention by send/recv of keys and values around the ring
allgather  attention by an all-gather of keys and values
attention  the operator and the autograd function of both
heads      attention and recurrences by an all-to-all: sequence shards for shards of the heads
states     recurrences by state passing: an all-gather of the segments' states
halo       convolutions by halo exchange: send/recv of the last rows of the segment before
plug       fills a model's seams with all of these
"""
