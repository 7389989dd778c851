"""The calls for a model of one's own: a module in, a module out."""
