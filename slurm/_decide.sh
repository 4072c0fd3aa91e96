# Prints what follows for the run, in one word: finished, requeue, or stop; the reasons go to the
# log. $1 is the status of the training; none: it has not started yet.
decide() {
    local facts options=(--since {{ job.since }} --max-failures {{ job.max_failures }})
    facts=$(scontrol show job --oneliner "$job")
    options+=(--job "$job" --facts "$facts")
{% if job.container_kind == "pyxis" %}
    "${srun[@]}" --nodes=1 --ntasks=1 \
        "${python[@]}" -m colonnade.launcher _after "$run" "$@" "${options[@]}"
{% else %}
    "${python[@]}" -m colonnade.launcher _after "$run" "$@" "${options[@]}"
{% endif %}
}

# A start before this one has finished the run, or found that it gets no further.
case $(decide) in
finished) exit 0 ;;
stop) exit 1 ;;
esac
