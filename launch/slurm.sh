#!/usr/bin/env bash
# Two nodes with eight GPUs each. RUN is the folder of the run: it is resumed if it exists.
#
#   RUN=runs/demo sbatch launch/slurm.sh configs/align/demo.py data.batch_size=4096
#   RUN=runs/demo ENGINE=fsdp2 sbatch --nodes 8 launch/slurm.sh configs/align/demo.py data.batch_size=16384
#
# Shortly before the time limit SLURM sends SIGUSR1 to this script. The run then saves a checkpoint and stops, and the job
# requeues itself and resumes it. ENGINE is ddp (the default), fsdp2, zero1, zero2, zero3: the launch config ENGINE_gpu8.yaml.
#SBATCH --job-name=vlp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

: "${RUN:?set RUN to the folder of the run, e.g. RUN=runs/demo}"
arguments=("$@" "output=$(dirname "$RUN")" "name=$(basename "$RUN")")
if [ -e "$RUN/experiment.json" ]; then
    arguments=(--resume "$RUN")
fi
MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file "launch/$1_gpu8.yaml" --num_machines "$SLURM_NNODES" \
        --num_processes $((8 * SLURM_NNODES)) --machine_rank "$SLURM_NODEID" --main_process_ip "$0" \
        --main_process_port 29500 -m vlp.train "${@:2}"' "$MAIN" "${ENGINE:-ddp}" "${arguments[@]}" &
step=$!

out_of_time=false
trap 'out_of_time=true; kill -TERM "$step"' USR1 # srun forwards SIGTERM to every node
code=0
wait "$step" || code=$?
if $out_of_time; then
    wait "$step" || true # the signal ended the first wait; the exit code is that of a stopped launcher
    [ -n "$(ls "$RUN/checkpoints" 2>/dev/null)" ] || exit 1 # nothing to resume: do not try for ever
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
