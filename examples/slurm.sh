#!/bin/bash
# ddpm train on two machines with eight GPUs each: sbatch slurm.sh
# Slurm sends SIGTERM two minutes before the time is up, which saves a checkpoint. Submit the same job again to continue.
# Not tried on a real cluster. Change the paths in the last line; the run's folder must be on a shared file system.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@120
#SBATCH --requeue

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=8 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first:29500" \
    -m ddpm_cli train /data/images -o /shared/runs/images --resume
