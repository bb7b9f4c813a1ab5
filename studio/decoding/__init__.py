"""How tokens are drawn: one method per file, pure functions and a small settings object each."""
