"""Measurements: what a model costs, what its routing does, how sure a number is."""
