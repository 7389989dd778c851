"""From notebooks to pages of the book: parameters, profiles, build, manifest, status, verdicts."""
