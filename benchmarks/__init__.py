"""Cost and accuracy of upweight beside its peers: see benchmarks/README.md."""
