"""Whole experts: their scores, and dropping or merging them."""
