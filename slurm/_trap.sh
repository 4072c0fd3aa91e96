# ---- Signals. {{ job.signal_before }} s before the time limit ends SLURM sends USR1 to this shell, and to it alone;
# it passes that on to the tasks, which save after their step and stop. TERM (scancel, preemption)
# reaches the tasks without this shell, which only has to outlive it until they have saved.
# Commands about the job name it by both numbers if it is of an array: one would mean all of them.
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
trap 'echo "USR1: the tasks save and stop" >&2; scancel --signal=USR1 "$job"' USR1
trap 'echo "TERM: the tasks save and stop" >&2' TERM

# Waits for a process in the background, whatever signals come meanwhile; returns its status.
wait_for() {
    while kill -0 "$1" 2>/dev/null; do
        wait "$1"
    done
    wait "$1"
}
