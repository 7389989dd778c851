"""Functions of a model and a loader: a module in, a module out, with what the runs are made of."""
