"""Finds and verifies what goes into a run, images, labels and weights, and cuts splits."""
