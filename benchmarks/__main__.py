"""``make bench``: every measure in turn, each as a ratio within one run; keeps the numbers in runs/bench.json."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

MEASURES = (
    "start_up",
    "decode",
    "seek",
    "shards_a_node",
    "pack_memory",
    "align_scale",
    "remote_shards",
    "plan_accuracy",
    "clip_flops",
    "contrastive_memory",
    "uniformity_memory",
    "engine_memory",
    "save_stop",
    "queue_info_nce",
    "retrieval_memory",
    "vqa_ranking",
    "rerank",
    "data_wait",
    "albef_step",
    "vlmo_step",
)
LONG = ("soak",)  # run only if they are named


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    names = f"some of {', '.join(MEASURES)} (default: all of these), {', '.join(LONG)}"
    parser.add_argument("measures", nargs="*", default=MEASURES, help=names)
    options = parser.parse_args()
    path = Path("runs/bench.json")
    results = json.loads(path.read_text()) if path.exists() else {}
    failed = []
    for name in options.measures:
        began = time.monotonic()
        # each in a process of its own: peaks of memory are those of a process
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed.append(name)
            continue
        results[name] = json.loads(done.stdout) | {
            "took_seconds": round(time.monotonic() - began, 1),
            "machine": platform.processor() or platform.machine(),
            "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        print(name, json.dumps(results[name], indent=1), flush=True)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
