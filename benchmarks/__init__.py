"""Speed against its limit: `python -m benchmarks` prints one table, measured in one run."""
