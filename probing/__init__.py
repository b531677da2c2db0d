"""What probe.py measures: attention, keys and queries, next bytes."""
