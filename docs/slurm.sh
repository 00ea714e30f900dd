#!/bin/bash
# A job template: scratch-det study run ... --launcher slurm --slurm docs/slurm.sh. Edit it for your cluster. Each job of a
# study is this script with the words in double braces filled in; --dry-run prints the scripts. scratch-det study gives sbatch
# the job's name, its comment, dependencies, log and --requeue.
#
# name       the run, RUN@N for the part of it up to N iterations, or SEARCH/POINT
# command    the run, for srun: a task is a process
# processes  how many that are; gpus: as many, or 0 for a recipe whose MODEL.DEVICE is cpu
# threads    of a process on the CPU, as OMP_NUM_THREADS says where scratch-det study is started, or 1; 0 where a GPU works, and
#            for the step that chooses a search's best point, which trains nothing
# exit_file  where the code of a run that failed belongs, for scratch-det study status; started: what begins its log
# fail       fail("message") rejects a step before anything is submitted
{% set nodes = (processes / 8) | round(0, "ceil") | int %}
{% if processes % nodes %}
{{ fail("%d processes cannot be shared evenly by %d nodes of 8; change their number, or this file"
        | format(processes, nodes)) }}
{% endif %}
#SBATCH --partition=gpu
#SBATCH --account=detection
#SBATCH --time=1-00:00:00
#SBATCH --nodes={{ nodes }}
#SBATCH --ntasks-per-node={{ processes // nodes }}
#SBATCH --cpus-per-task=6
#SBATCH --mem=64GB
{% if gpus %}
#SBATCH --gpus-per-node={{ gpus // nodes }}
{% endif %}
# Seconds before the time limit at which a run is told to stop. It leaves a checkpoint, and is requeued below.
#SBATCH --signal=USR1@120

# module load cuda/12.6
export NCCL_DEBUG=WARN
{% if threads %}
export OMP_NUM_THREADS={{ threads }}
{% endif %}

echo {{ started }}"$(date): job $SLURM_JOB_ID"
rm -f {{ exit_file }}
srun --cpus-per-task=6 --kill-on-bad-exit=0 --wait=60 {{ command }}
code=$?
case $code in
    0) ;;
    75|138) scontrol requeue $SLURM_JOB_ID ;;  # told to stop: goes on from its checkpoint
    *) echo $code > {{ exit_file }} ;;
esac
exit $code
