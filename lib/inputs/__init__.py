"""What goes into a run: images, labels and weights, found, verified and cut into splits."""
