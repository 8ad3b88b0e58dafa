#!/usr/bin/env bash
# Two nodes with eight GPUs each: sbatch launch/slurm.sh configs/align/demo.py data.batch_size=4096
# To continue after the time limit: RUN=runs/demo sbatch launch/slurm.sh. At the time limit SLURM sends SIGTERM, at which
# the run saves a checkpoint and exits. Without a run in $RUN the arguments start a new one.
#SBATCH --job-name=vlp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
set -euo pipefail

RUN=${RUN:-}
arguments=("$@")
if [ -n "$RUN" ] && [ -e "$RUN/experiment.json" ]; then
    arguments=(--resume "$RUN")
fi
MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --multi_gpu --num_machines "$SLURM_NNODES" --num_processes $((8 * SLURM_NNODES)) \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$0" --main_process_port 29500 --mixed_precision no --dynamo_backend no \
        -m vlp.train "$@"' "$MAIN" "${arguments[@]}"
