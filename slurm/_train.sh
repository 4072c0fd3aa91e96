# ---- The training. A job that starts again gives the same command, and so goes on from the
# newest checkpoint that is whole. Fields of the recipe may be changed here.
train=(
    train {{ job.recipe | quote }}
{% for override in job.overrides %}
    {{ override | quote }}
{% endfor %}
    --run-dir "$run" --resume auto
)
