"""What the launcher has put into the environment: settings that must agree with the experiment, and processes to wait for.

Accelerate and torch wait for missing processes in C++ code, where nothing is printed and no signal is handled. So the
processes find each other here first.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from vlp.config import Training
from vlp.errors import UserError
from vlp.training.interrupts import SIGNALS, Stopped

PRECISIONS = {"fp32": "no", "bf16": "bf16"}  # our names -> those of Accelerate
FIRST_NOTE, NEXT_NOTE, GIVE_UP = 20.0, 60.0, 600.0  # seconds of waiting for other processes
POLL = 0.1  # seconds


def number_of(variable: str, default: int) -> int:
    """Return the whole number in a variable of the environment.

    Raises:
        UserError: If its value is something else.
    """
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment has {variable}={text}, which is not a whole number; unset it")
    return int(text)


def check_settings(train: Training) -> None:
    """Check that the launcher asks for nothing that the run would silently ignore.

    Raises:
        UserError: If it asks for another precision, accumulation or clipping than the experiment, or for compilation.
    """
    ours = PRECISIONS[train.precision]
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("no", ours):
        known = {theirs: name for name, theirs in PRECISIONS.items()}
        other = f", or set train.precision={known[asked]}" if asked in known else ""
        raise UserError(
            f"the launcher asks for mixed precision {asked} and train.precision is {train.precision}; launch with "
            f"--mixed_precision no{other}"
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UserError("the launcher asks for compilation (--dynamo_backend); set train.compile=true instead")
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation not in ("1", str(train.accumulation)):
        raise UserError(
            f"the launcher asks for {accumulation} gradient accumulation steps and train.accumulation is "
            f"{train.accumulation}; set it in the experiment only"
        )
    clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clipping not in ("none", str(train.clip_norm).lower()):
        raise UserError(
            f"the launcher asks for gradient clipping at {clipping} and train.clip_norm is {train.clip_norm}; set it in "
            f"the experiment only"
        )
    # Accelerate prefers these two variables to its arguments.
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    os.environ.pop("ACCELERATE_GRADIENT_CLIPPING", None)


def find_processes() -> dist.Store | None:
    """Wait until all processes that the launcher announced are there, and say who is awaited.

    Returns:
        The store through which they have found each other, which must live until the process group exists. None for a
        single process.

    Raises:
        UserError: If the environment is incomplete, the port cannot be used, or a process is missing after `GIVE_UP`.
        Stopped: If the process is asked to stop meanwhile.
    """
    world = number_of("WORLD_SIZE", 1)
    if world == 1 or dist.is_initialized():
        return None
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(
            f"the environment has WORLD_SIZE={world} and not {', '.join(missing)}; start several processes with "
            f"accelerate launch, or unset WORLD_SIZE to train in one"
        )
    rank, host, port = number_of("RANK", 0), os.environ["MASTER_ADDR"], number_of("MASTER_PORT", 0)
    if rank >= world:
        raise UserError(
            f"the environment has RANK={rank} of WORLD_SIZE={world}; start the processes with accelerate launch"
        )
    if not 0 < port < 1 << 16:
        raise UserError(f"the environment has MASTER_PORT={port}; give the launcher a --main_process_port up to 65535")
    with stop_at_once():
        # torchrun's agent has the store already
        is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not is_server:
            for _ in waiting(f"process 0 of {world} at {host}:{port}"):
                if answers(host, port):
                    break
        store = open_store(host, port, world, is_server)
        key = f"vlp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/"
        store.set(f"{key}{rank}", "here")
        keys = [f"{key}{other}" for other in range(world)]

        def missing_processes() -> str:
            absent = [str(other) for other, name in enumerate(keys) if not store.check([name])]
            some = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
            return f"process{'es' * (len(absent) > 1)} {some} of {world} (0 to {world - 1}) to connect to {host}:{port}"

        for _ in waiting(missing_processes, quiet=rank > 0):
            if store.check(keys):
                return store
    raise AssertionError("waiting ends with a result or an error")


def waiting(for_whom, quiet: bool = False) -> Iterator[None]:
    """Yield every `POLL` seconds, and print who is awaited from time to time.

    Args:
        for_whom: Who is awaited, or a function that returns it.
        quiet: Whether another process prints it.

    Raises:
        UserError: After `GIVE_UP` seconds.
    """
    began, note = time.monotonic(), FIRST_NOTE
    while True:
        yield
        waited = time.monotonic() - began
        if waited > min(note, GIVE_UP):
            note += NEXT_NOTE
            who = for_whom() if callable(for_whom) else for_whom
            hint = "start it, or unset WORLD_SIZE to train in one process"
            if waited > GIVE_UP:
                raise UserError(f"waited {waited:.0f} s for {who}; {hint}")
            if not quiet:
                print(f"vlp: waiting for {who}; {hint}", file=sys.stderr, flush=True)
        time.sleep(POLL)


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Context in which Ctrl-C and SIGTERM raise `Stopped`: nothing has been done that could be lost."""

    def stop(number, frame):
        raise Stopped

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def open_store(host: str, port: int, world: int, is_server: bool) -> dist.TCPStore:
    """Open the store that torch opens again when it connects the processes, which the last argument allows."""
    try:
        socket.getaddrinfo(host, port)  # torch would try for minutes
    except OSError as e:
        raise UserError(
            f"the environment has MASTER_ADDR={host}, which is not known ({e.strerror}); correct it"
        ) from None
    try:
        return dist.TCPStore(
            host, port, world, is_server, timedelta(seconds=30), wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as e:
        if "EADDRINUSE" not in str(e) and "in use" not in str(e):
            reason = str(e).splitlines()[0]
            raise UserError(f"processes cannot meet at {host}:{port} ({reason}); check MASTER_ADDR") from None
        raise UserError(
            f"port {port} is in use; launch with another --main_process_port, e.g. 0 for any free one"
        ) from None
