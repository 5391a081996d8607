#!/bin/bash
# Train on two machines with eight GPUs each, under SLURM:
#
#     sbatch examples/slurm.sh [CONFIG] [KEY VALUE …]
#
# from the root of the repository, in a folder that all machines see. SLURM starts one task on each machine, and that
# starts a process for each GPU. Five minutes before the time is up every process gets SIGTERM, finishes its step and
# saves; the job then goes back into the queue and, with --resume, on from there.

#SBATCH --job-name=domainnorm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=48
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append

set -euo pipefail

CONFIG=${1:-configs/paper/table3_6/shuffle_1_image.yaml}  # 16 images a step, one on each GPU
machines=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
URL=tcp://${machines%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))
export CONFIG URL

# SLURM_NODEID is this machine's number only within srun, so it is expanded there.
status=0
srun bash -c 'exec python tools/train_net.py --config-file "$CONFIG" --resume --num-gpus 8 \
    --num-machines "$SLURM_NNODES" --machine-rank "$SLURM_NODEID" --dist-url "$URL" "$@"' train "${@:2}" || status=$?
if [ "$status" -eq 143 ]; then  # SIGTERM
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
