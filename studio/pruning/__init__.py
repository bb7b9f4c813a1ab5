"""Which visual tokens a vision-language model keeps: one method per file, pure functions."""
