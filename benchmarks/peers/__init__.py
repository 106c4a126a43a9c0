"""fastscore beside what people use today: see `python -m benchmarks.peers --help`."""
