# ---- The environment of the tasks: edit it to what your cluster needs. -------------------------
cd {{ job.folder | quote }} || exit 1
{% for module in job.modules %}
module load {{ module | quote }} || exit 1
{% endfor %}
{% for line in job.lines %}
{{ line }}
{% endfor %}
set -u -o pipefail # from here on, because scripts of modules read variables that are not set

{% if job.container_kind == "apptainer" %}
# Apptainer runs every Python process in the image.
python=(apptainer exec --nv --bind {{ job.run | quote }} {{ job.container | quote }} python)
srun=(srun)
{% elif job.container_kind == "pyxis" %}
# Pyxis, SLURM's plugin for containers of Enroot, starts the tasks in the image.
python=(python)
srun=(srun --container-image={{ job.container | quote }} --container-workdir="$PWD")
srun+=(--container-mounts="$PWD,"{{ job.run | quote }})
{% else %}
# The Python that submitted the job; every node has to see it under this path.
python=({{ job.python | quote }})
srun=(srun)
{% endif %}
# srun does not take this number from the job by itself.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
