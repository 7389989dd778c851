"""Making a trained model smaller by removing neurons, attention dimensions or whole experts."""
