"""The paper's experiments as a list, and its numbers. Never imports torch."""
