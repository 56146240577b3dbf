"""Studies behind every number this project claims. ``python -m benchmarks <study>``."""
