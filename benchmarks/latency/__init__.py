"""`python -m benchmarks.latency`: what merging costs and saves, for the README's tables."""
