"""Operations that run beside the passes: copies between device and host, and updates of state.

tasks  the operations, the interface of the lanes that run them, and lanes without a device
cuda   the lanes of a GPU
clock  lanes on a simulated clock
"""
