#!/bin/bash
#SBATCH --nodes=1
#SBATCH --ntasks-per-node={{ processes }}
{% if gpus %}
#SBATCH --gpus-per-node={{ gpus }}
{% endif %}
#SBATCH --signal=USR1@120
{% if threads %}
export OMP_NUM_THREADS={{ threads }}
{% endif %}
echo {{ started }}"$(date): job $SLURM_JOB_ID"
rm -f {{ exit_file }}
srun --kill-on-bad-exit=0 --wait=60 {{ command }}
code=$?
case $code in
    0) ;;
    75|138) scontrol requeue $SLURM_JOB_ID ;;  # stopped by a signal, 120 seconds before the time limit or by preemption
    *) echo $code > {{ exit_file }} ;;
esac
exit $code
