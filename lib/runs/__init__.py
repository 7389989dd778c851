"""From a RunSpec to its record: collecting, executing, storing and locking."""
