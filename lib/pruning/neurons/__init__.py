"""Hidden neurons and attention dimensions: their scores and their physical removal."""
