# ---- After the end: a run that was saved by a signal goes on in this job, started again; one
# that failed does so too, unless {{ job.max_failures }} starts in a row failed and got no further.
word=$(decide "$status")
case $word in
finished) exit 0 ;;
requeue)
    scontrol requeue "$job" && exit 0
    # SLURM refuses where the job has Requeue=0, which is how a user lets it end
    echo "not requeued: submit the run again to go on" >&2
    ;;
esac
exit "$((status ? status : 1))" # it stops for good; the log says why
