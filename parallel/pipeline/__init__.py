"""Pipeline parallelism: the row of sub-blocks is divided into stages, which ranks of `pp` run.

placement   which rank has which stages, where the row is divided, what schedules need (no torch)
schedule    the actions of a rank in order, those of torch.distributed.pipelining
pipeline    runs them: passes of stages, send/recv between them
timeline    records when a rank does what
bubble      the idle time of a schedule (no torch)
shared      weights of which several ranks have a copy
"""
