#!/bin/bash
# A training run under SLURM that survives preemption and time limits: two minutes before either it is told (SIGUSR1), saves and
# ends with status 75, upon which the job goes back into the queue and continues from its newest checkpoint.
#
#   sbatch docs/slurm.sh --train_manifest train.jsonl --output_dir runs/voice --save_steps 500
#
# Submit it from the folder of this code; the output folder has to be one that all nodes see.
#SBATCH --job-name=higgs
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120

export NNODES=$SLURM_NNODES
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

srun --kill-on-bad-exit=0 bash -c 'NODE_RANK=$SLURM_NODEID exec bash launch.sh "$@"' launch --resume auto "$@"
status=$?
if [ "$status" = 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
