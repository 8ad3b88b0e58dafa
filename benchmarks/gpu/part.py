"""``python -m benchmarks.gpu.part NAME MODULE LINES [--small]``: run a part's checks; each appends a line of JSON to LINES."""

from __future__ import annotations

import argparse
import importlib
import json
import time
import traceback


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("module")
    parser.add_argument("lines")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    checks = importlib.import_module(options.module).checks(options.small)
    for name, check in checks.items():
        began = time.monotonic()
        try:
            found = check()
        except Exception:
            traceback.print_exc()
            found = {"error": traceback.format_exc().splitlines()[-1][:500]}
        line = {"part": options.name, "check": name, "took_seconds": round(time.monotonic() - began, 2), **found}
        with open(options.lines, "a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
