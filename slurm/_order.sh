# ---- The order of ranks: those of a node are consecutive, so tensor parallelism stays inside a
# node; where SLURM knows the switches, nodes of one switch follow each other.
if hosts=$("${python[@]}" -m colonnade.launcher _order --ranks-per-node {{ job.ranks_per_node }}) &&
    [ -n "$hosts" ]; then
    export SLURM_HOSTFILE=$run/{{ job.hosts_file }}
    printf '%s\n' "$hosts" >"$SLURM_HOSTFILE"
    export MASTER_ADDR=${hosts%%[[:space:]]*} # rank 0 runs on the first
    order=(--distribution=arbitrary)
else
    order=(--distribution=block)
fi
