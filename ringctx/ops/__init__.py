"""The maths of one device: no ranks, no process groups, no files."""
