"""Plumbing of the benchmark programs: data folder, captions, resident memory, fresh processes, command line."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from vlp.data.text import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("VLP_BENCHMARK_DATA") or ROOT.parent / "shared" / "data")


def main(measure: Callable[..., dict], sizes: dict, small: dict) -> None:
    """Print what ``measure`` returns for ``sizes``, or with ``--small`` for ``small``, as JSON. Options set single numbers."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--small", action="store_true", help="tiny sizes: shows that the program runs, measures nothing"
    )
    for name, value in sizes.items():
        if isinstance(value, (int, float)):
            parser.add_argument(f"--{name}", type=type(value), help=f"default: {value}")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    chosen = small if given.pop("small") else sizes
    print(json.dumps(measure(**chosen | given), indent=1))


def first_captions(split: str | None = None) -> list[str]:
    """The first caption of each Flickr8k photo, of one split or of all."""
    lines = (DATA / "flickr8k" / "captions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["captions"][0] for row in rows if split in (None, row["split"])]


def text_tokenizer(clean: bool = False) -> Tokenizer:
    """BERT's, without [SEP], as ALBEF was trained with."""
    return load_tokenizer(str(DATA / "text" / "bert_base_uncased_vocab.txt"), sep=False, clean=clean)


def resident_mib(field: str, pid: int | str = "self") -> float:
    """Resident memory of this process or another: VmRSS now, VmHWM at its peak (Linux)."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()).group(1)) / 1024


def allocated_peak(function: Callable[[], object]) -> int:
    """Return the peak of the bytes that torch allocates on the CPU while the function runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def in_fresh_process(function, *arguments):
    """Peaks of memory are those of a process, so each measurement of one runs in its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
