"""The parts of the command, most important first, and how one is run: in a process of its own, with a limit of its own.

A part is a module with ``checks(small) -> dict``, name -> function that returns JSON-able numbers. Each check writes its line
as soon as it is done, so a part that is stopped at its limit keeps what it had. A check fails if it raises, or if what it
returns has ``"ok": False``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHECKS, LOG = "checks.jsonl", "log.txt"  # of all parts: what is there even if the whole command is killed


@dataclass(frozen=True)
class Part:
    """One part.

    Args:
        module: has ``checks``.
        limit: seconds after which it is stopped, on a GPU.
        what: for the page.
    """

    name: str
    module: str
    limit: float
    what: str


PARTS = (
    Part("right-steps", "benchmarks.gpu.right_steps", 75, "losses and gradients, device against CPU"),
    Part("right-runs", "benchmarks.gpu.right_runs", 60, "resume, NCCL, ZeRO and FSDP2 with one process"),
    Part("fast-passes", "benchmarks.gpu.fast_passes", 65, "ALBEF and VLMo against the published passes"),
    Part("fast-clip", "benchmarks.gpu.fast_clip", 95, "CLIP against open_clip"),
    Part("learns", "benchmarks.gpu.learns", 105, "two minutes of training, with the held-out curve"),
    Part("fast-syncs", "benchmarks.gpu.fast_syncs", 25, "places where the host waits for the device"),
    Part("fast-loader", "benchmarks.gpu.fast_loader", 25, "images a second against webdataset + torchvision"),
    Part("fast-rank", "benchmarks.gpu.fast_rank", 25, "contrastive loss at 32,768, re-ranking, VQA ranking"),
)


def selected(name: str | None) -> list[Part]:
    """All parts, the one of this name, or those of this family: "right", "fast", "learns"."""
    return [part for part in PARTS if name is None or part.name == name or part.name.startswith(f"{name}-")]


def run_part(part: Part, out: Path, limit: float, small: bool, environment: Mapping[str, str]) -> dict:
    """The part's status, seconds and checks, and the last lines that it printed if it failed."""
    lines, log = out / CHECKS, out / LOG
    command = [sys.executable, "-m", "benchmarks.gpu.part", part.name, part.module, str(lines), *["--small"] * small]
    began, logged = time.monotonic(), log.stat().st_size if log.exists() else 0
    with open(log, "a") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
    every = map(json.loads, lines.read_text().splitlines()) if lines.exists() else ()
    checks = [check for check in every if check.pop("part") == part.name]
    status = "over its limit" if code is None else "failed" if code or any(map(failed, checks)) else "ok"
    result = {"what": part.what, "status": status, "limit": round(limit), "seconds": round(time.monotonic() - began, 1)}
    result["checks"] = checks
    if status != "ok":
        result["last_lines"] = log.read_bytes()[logged:].decode(errors="replace").splitlines()[-15:]
    return result


def failed(check: dict) -> bool:
    return "error" in check or check.get("ok") is False


def stop(process: subprocess.Popen) -> None:
    """End the process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_parts(
    parts: Sequence[Part],
    out: Path,
    seconds: float,
    small: bool,
    environment: Mapping[str, str],
    beside: Sequence[subprocess.Popen] = (),
) -> dict[str, dict]:
    """Results by name. What no time is left for is "not run".

    Args:
        seconds: for all of them.
        beside: processes to end before the first part that measures time.
    """
    for name in (CHECKS, LOG):
        (out / name).unlink(missing_ok=True)
    end, results = time.monotonic() + seconds, {}
    for part in parts:
        if part.name.startswith("fast"):
            for process in beside:
                stop(process)
        left = end - time.monotonic()
        if left < min(5, part.limit):
            results[part.name] = {"what": part.what, "status": "not run", "checks": []}
            continue
        results[part.name] = run_part(part, out, min(part.limit, left), small, environment)
        print(f"{part.name}: {results[part.name]['status']}, {results[part.name]['seconds']} s", flush=True)
    for process in beside:
        stop(process)
    return results
