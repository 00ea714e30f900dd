"""The paper's experiments: listed, planned, run anywhere, and set beside its numbers. Never imports torch."""
