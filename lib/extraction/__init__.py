"""Experts extracted from the MLPs of a trained network (MoEE, 2505.15414), and static rivals."""
