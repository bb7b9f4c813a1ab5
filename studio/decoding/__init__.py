"""How tokens are sampled: one method per file, pure functions and a small settings object each."""
