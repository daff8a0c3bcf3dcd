"""What the package costs, each number a ratio to a floor measured in the same run: ``python -m tests.benchmarks``."""
