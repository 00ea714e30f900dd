"""The check before the first iteration: what a run would refuse, what it will do and what it needs.

Imports torch only where the model is built or images are read.
"""
