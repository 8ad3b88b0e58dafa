"""vlp: vision-language pre-training research in one loop.

The data flow, from a shard to an optimizer step, is drawn in README.md ("How it fits together").
"""

__version__ = "0.1.0"
