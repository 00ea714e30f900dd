"""Weights of many origins: where they are, reading them safely, what a file is, names, loading and converting."""
