"""AdamW with its state in the host's memory.

adamw       the optimizer
scheduler   the order of a step's operations on lanes (`parallel.lanes`), drawn
work        what the operations do with tensors
groups      parameters whose state moves together
host_state  that state on the host; memory: slabs, and what the device has free
arrivals    when backward has completed a gradient
placement   where each group is updated; rates: how fast this machine is
"""
