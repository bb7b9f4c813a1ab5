"""Networks that model image tokens: no sampling loops, no images."""
