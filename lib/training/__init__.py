"""One training loop, its losses, evaluation, and bfloat16 arithmetic."""
