"""vlp: vision-language pre-training research in one loop.

The data flow, from a shard to an optimizer step, is drawn in README.md ("How it fits together").
"""

import os

__version__ = "0.1.0"

# On a CPU, torch's threads wait for each other by spinning: whenever a loading worker, or anything else, needs a core, all
# of them burn theirs until the one that lost it is back, and a step takes several times as long. So they spin for the short
# gaps between two operations only, and then sleep. Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
