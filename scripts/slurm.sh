#!/bin/bash
# One stage, or a whole pipeline, on the nodes of a SLURM allocation. Submit it from the project's folder:
#
#   sbatch --nodes 2 --gpus-per-node 8 scripts/slurm.sh ppo recipes/hh/ppo.yaml --run runs/hh
#   sbatch --nodes 1 --gpus-per-node 8 scripts/slurm.sh run recipes/hh/pipeline.yaml --run runs/hh
#
# More than one node needs ssh between the nodes of the allocation and pdsh on the first of them (docs/distributed.md).
#SBATCH --job-name=rlhf
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
set -euo pipefail

[ $# -gt 0 ] || { echo "usage: sbatch [OPTIONS] scripts/slurm.sh STAGE RECIPE --run DIR [RLHF OPTIONS]" >&2; exit 2; }
gpus=${SLURM_GPUS_ON_NODE:?expected an allocation with GPUS: add --gpus-per-node N}
if [ -f .venv/bin/activate ]; then
    source .venv/bin/activate
fi

if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
    hosts=hosts.$SLURM_JOB_ID
    trap 'rm -f "$hosts"' EXIT
    scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$gpus/" > "$hosts"
    world=(--hostfile "$hosts")
else
    world=(--gpus "$gpus")
fi

# The time limit's warning goes to rlhf, which writes a checkpoint and exits 75; then the job is queued again.
rlhf "$@" "${world[@]}" &
child=$!
trap 'kill -TERM "$child"' TERM
code=0
wait "$child" || code=$?
while kill -0 "$child" 2> /dev/null; do # a signal ends `wait`, not the command
    code=0
    wait "$child" || code=$?
done
run=
for ((i = 1; i < $#; i++)); do
    next=$((i + 1))
    if [ "${!i}" = --run ]; then run=${!next}; fi
done
# A file STOP in a stage folder (it stays until the next start) means that the job is to end for good.
if [ "$code" -eq 75 ] && ! compgen -G "$run/*/STOP" > /dev/null; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
