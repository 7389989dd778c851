"""Cutting experts out of the MLPs of a trained network (MoEE, 2505.15414), and its static rivals."""
