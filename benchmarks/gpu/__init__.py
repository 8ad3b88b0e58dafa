"""One prepared command for whenever a GPU is at hand: ``python -m benchmarks.gpu --out DIR``. See README.md, "On a GPU"."""
