"""Launchers start the steps of a study: local.py as processes on this machine, slurm.py as jobs of a cluster."""
