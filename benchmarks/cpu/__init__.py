"""Benchmarks on a CPU against other libraries: ``make bench-cpu``, or ``python benchmarks/cpu/run.py --help``."""
