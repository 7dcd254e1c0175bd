"""Parts timed beside their usual form: `python -m benchmarks` runs all of them."""
