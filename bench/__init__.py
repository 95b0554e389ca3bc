"""Benchmarks and experiments: run from the repository root, `python -m bench.FOLDER.FILE`."""
