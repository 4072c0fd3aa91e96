"""`doctor --cluster`: measures the hosts of an allocation and what connects them.

run         the order of measurements, and the report
reach       who can connect to whom
tournament  the order in which pairs are measured
links       bandwidth and latency of pairs
clock       differences of clocks
health      rates of processors, and what nvidia-smi says
findings    what is wrong, in sentences
table       the report as text; picture: as a heat map
"""
