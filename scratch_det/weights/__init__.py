"""Weights of many origins: where they lie, reading them safely, their names, loading and converting them."""
