"""`python -m benchmarks.slides`: the slides' tables and curves of SReT with ToMe, on a CPU."""
