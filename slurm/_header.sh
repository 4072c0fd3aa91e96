#SBATCH --job-name={{ job.name | option }}
#SBATCH --nodes={{ job.node_range }}
#SBATCH --ntasks-per-node={{ tasks_per_node | default(job.ranks_per_node) }}
{% if job.gpus_per_node %}
#SBATCH --gpus-per-node={{ job.gpus_per_node }}
{% endif %}
{% if job.cpus_per_rank %}
#SBATCH --cpus-per-task={{ job.cpus_per_rank * (job.ranks_per_node // (tasks_per_node | default(job.ranks_per_node))) }}
{% endif %}
{% for name in ("mem", "time", "account", "partition", "qos") %}
{% if job[name] %}
#SBATCH --{{ name }}={{ job[name] | option }}
{% endif %}
{% endfor %}
# A requeued job goes on in the same file.
#SBATCH --output={{ (job.run ~ "/" ~ job.log) | option }}
#SBATCH --open-mode=append
{% for line in job.sbatch %}
#SBATCH {{ line }}
{% endfor %}
