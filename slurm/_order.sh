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
{% if job.container_kind %}
    # an image has no scontrol by which ranks could find the first node
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export MASTER_ADDR
{% endif %}
fi
