"""Making trained models smaller: which neurons, experts or patches matter, and their removal."""
