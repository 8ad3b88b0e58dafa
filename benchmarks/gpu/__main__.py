"""``python -m benchmarks.gpu --out DIR [--part NAME] [--small]``: gpu.json and gpu.html in DIR, in less than eight minutes.

It needs what a bare machine with a GPU has (Python, torch, torchvision, timm, transformers, accelerate) and what
``python -m benchmarks.gpu.carry`` has put into .carry/; without that folder, an environment with all of vlp's packages.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from benchmarks.gpu.parts import PARTS, ROOT, run_parts, selected

SECONDS = 475  # for all parts
SMALL_SECONDS = 1200  # where a CPU may be busy with other work
CARRIED, KEPT = ROOT / ".carry", ROOT / "benchmarks" / "results"
FACTS = """
import json, os, torch
gpu = torch.cuda.is_available()
card = f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB" if gpu else "a CPU"
print(json.dumps({"gpu": gpu, "card": card, "torch": torch.__version__, "cuda": torch.version.cuda, "cores": os.cpu_count()}))
"""


def main() -> int:
    families = sorted({part.name.split("-")[0] for part in PARTS})
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, gpu.html and logs")
    parser.add_argument("--part", choices=[*families, *(part.name for part in PARTS)], help="default: all")
    parser.add_argument("--small", action="store_true", help="tiny sizes: shows that every part runs, also on a CPU")
    options = parser.parse_args()
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    with tempfile.TemporaryDirectory(prefix="vlp-gpu-") as work:
        environment = prepared(Path(work))
        run = facts(environment) | {"small": options.small}
        beside = [warm_up(environment)] if run["gpu"] and not options.small else []
        chosen = [replace(part, limit=SMALL_SECONDS) if options.small else part for part in selected(options.part)]
        seconds = SMALL_SECONDS if options.small else SECONDS
        parts = run_parts(chosen, out, seconds, options.small, environment, beside)
    run |= {
        "seconds": round(time.monotonic() - began),
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
    }
    write(out, run, parts)
    return 0 if all(part["status"] == "ok" for part in parts.values()) else 1


def write(out: Path, run: dict, parts: dict[str, dict]) -> None:
    """gpu.json first: it needs nothing but Python."""
    from benchmarks.gpu.goals import measured

    results = {"run": run, "goals": measured(parts, run["small"]), "parts": parts}
    (out / "gpu.json").write_text(json.dumps(results, indent=1))
    from benchmarks.gpu.page import render

    (out / "gpu.html").write_text(render(results, newest_kept()))
    for row in results["goals"]:
        print(f"{row['verdict']:8} {row['goal']}: {row['measured']} ({row['wanted']})")
    print(f"{out / 'gpu.json'}, {out / 'gpu.html'}: {run['seconds']} s")


def newest_kept() -> dict | None:
    """The results of the last run that is kept in the repository."""
    kept = [json.loads(path.read_text()) for path in KEPT.glob("*.json")]
    return max(kept, key=lambda results: results["run"]["date"], default=None)


def prepared(work: Path) -> dict[str, str]:
    """The environment of the parts, with what was carried unpacked in ``work``."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TMPDIR": str(work)}
    path = [str(ROOT), environment.get("PYTHONPATH", "")]
    if (CARRIED / "wheels").is_dir():
        install(sorted((CARRIED / "wheels").glob("*.whl")), work / "site")
        path.insert(1, str(work / "site"))
    if (CARRIED / "data.tar.xz").is_file():
        with tarfile.open(CARRIED / "data.tar.xz") as archive:
            archive.extractall(work / "data", filter="data")
        environment["VLP_BENCHMARK_DATA"] = str(work / "data")
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def install(wheels: list[Path], site: Path) -> None:
    """Those wheels whose package is not here yet."""
    missing = [str(wheel) for wheel in wheels if not installed(wheel.name.split("-")[0])]
    if missing:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*pip, "--target", str(site), *missing], check=True)


def installed(name: str) -> bool:
    try:
        return bool(distribution(name))
    except PackageNotFoundError:
        return False


def facts(environment: Mapping[str, str]) -> dict:
    """Card, versions, commit, date."""
    done = subprocess.run([sys.executable, "-c", FACTS], env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout) | {"commit": commit(), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def commit() -> str:
    """As it was carried, or as git says; "unknown" where there is neither."""
    if (CARRIED / "commit").is_file() and not (ROOT / ".git").exists():
        return (CARRIED / "commit").read_text().strip()
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def warm_up(environment: Mapping[str, str]) -> subprocess.Popen:
    """Compile CLIP's steps beside the parts that measure no time; see `benchmarks.gpu.warm`."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-m", "benchmarks.gpu.warm"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **quiet)


if __name__ == "__main__":
    sys.exit(main())
