"""Copy a run to an object store or another folder, and fetch it from there.

    URL/NAME/ experiment.json, log.jsonl and the other records  code/ tokenizer/ eval/  checkpoints/step-N/ ... manifest.json

The files of a checkpoint are copied first and its manifest last, so a checkpoint without a manifest is incomplete. Credentials
come from the environment or the configuration of the store, never from a URL, which the run folder contains.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.implementations.local import LocalFileSystem

from vlp.data.reading.locations import SCHEME, SCHEMES, locked, reason_of, retry
from vlp.errors import UserError
from vlp.files import is_possible_path, local_path, write_atomically
from vlp.training import checkpoint
from vlp.training.run_lock import RunLock
from vlp.weights import checkpoints

WRITABLE = tuple(scheme for scheme in SCHEMES if scheme not in ("http", "https"))
PACKAGES = {"s3": "'vlp[s3]'", "s3a": "'vlp[s3]'", "gs": "'vlp[gcs]'", "gcs": "'vlp[gcs]'", "hf": "huggingface_hub"}
PACKAGES |= {"az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "hdfs": "pyarrow"}
FOLDERS = ("code", "tokenizer", "eval")
BEST = "checkpoints/best.json"


def is_url(text: str) -> bool:
    """Return whether a run is named by a URL and not by a local path."""
    return SCHEME.match(text) is not None


def check_url(url: str, option: str) -> str:
    """Return the URL of a folder without a slash at its end.

    Args:
        url: URL, or path of a local folder.
        option: Where it was given, for messages.

    Raises:
        UserError: If no run can be copied there. The message never repeats a password.
    """
    scheme, separator, rest = url.rpartition("://") if url.count("://") == 1 else ("", "", url)
    user, at, _ = rest.rpartition("@")
    if "?" in url or "#" in url or (separator and at and ":" in user):
        raise UserError(
            f"{option} has a password or parameters in its URL, which run folders would contain; leave them out and set the "
            f"credentials of the store in its environment variables or its configuration file"
        )
    if "::" in url or "://" in rest or not is_possible_path(url) or not url.isprintable():
        raise UserError(f"{option}={url!r} is not the URL of a folder; give one such as s3://bucket/runs")
    if not separator:
        if not url or ":" in url.partition("/")[0]:
            raise UserError(f"{option}={url!r} is neither a folder nor a URL; give one such as s3://bucket/runs")
        return str(local_path(url))
    if scheme.lower() not in WRITABLE:
        raise UserError(
            f"{option}={url}: nothing can be stored at {scheme}://; give a URL of {', '.join(WRITABLE)}, or a folder"
        )
    if not rest.strip("/") and scheme.lower() != "memory":
        raise UserError(f"{option}={url} names no bucket or folder; give one such as s3://bucket/runs")
    return f"{scheme.lower()}://{rest.rstrip('/')}"


class Store:
    """Folder of an object store or of the local disk.

    Raises:
        UserError: If its protocol needs a package that is not installed, or the store cannot be opened.
    """

    def __init__(self, url: str):
        scheme = url.partition("://")[0]
        self.url, self.local = url, scheme in ("file", url)
        try:
            if self.local:
                self.fs, self.root = LocalFileSystem(auto_mkdir=True), os.path.abspath(url.removeprefix("file://"))
            else:
                self.fs, self.root = fsspec.core.url_to_fs(url)
        except ImportError:
            raise UserError(
                f"{url} needs a package that is not installed; pip install {PACKAGES.get(scheme, scheme)}"
            ) from None
        except Exception as e:  # every file system has its own errors
            raise UserError(f"cannot open {url}: {reason_of(e)}; check the URL and the credentials") from None
        self.root = self.root.rstrip("/")

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, of which a reader sees everything or nothing."""
        if self.local:
            path = Path(self.root) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            retry(lambda: write_atomically(path, data))
        else:
            retry(lambda: self.fs.pipe_file(f"{self.root}/{name}", data))

    def upload(self, path: Path, name: str) -> None:
        """Copy a file to the store, and compare the sizes."""

        def copy() -> None:
            self.fs.put_file(str(path), f"{self.root}/{name}")
            self.fs.invalidate_cache()
            size = self.fs.info(f"{self.root}/{name}")["size"]
            if size != path.stat().st_size:
                raise OSError(f"{name} has {size:,} bytes there instead of {path.stat().st_size:,}")

        retry(copy)

    def download(self, name: str, path: Path) -> None:
        """Copy a file from the store."""
        path.parent.mkdir(parents=True, exist_ok=True)
        retry(lambda: self.fs.get_file(f"{self.root}/{name}", str(path)))

    def read(self, name: str) -> bytes | None:
        """Return the first bytes of a small file, or None if there is none."""
        try:
            return retry(lambda: self.fs.cat_file(f"{self.root}/{name}", start=0, end=checkpoints.MAX_JSON))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def remove(self, name: str) -> None:
        retry(lambda: self.fs.rm(f"{self.root}/{name}", recursive=True))

    def names(self) -> list[str]:
        """Return the paths of all files, relative to the folder."""
        self.fs.invalidate_cache()
        try:
            found = retry(lambda: self.fs.find(self.root))
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = [path[len(self.root) + 1 :] for path in found if path.startswith(f"{self.root}/")]
        return [name for name in names if not {"", ".", ".."} & set(name.split("/"))]


def steps_in(names: list[str]) -> tuple[list[str], list[str]]:
    """Return the names of complete checkpoints, newest first, and of all checkpoints, among the files of a run."""
    parts = [PurePosixPath(name).parts for name in names]
    files = {p[1:] for p in parts if len(p) == 3 and p[0] == "checkpoints" and re.fullmatch(r"step-\d{8,}", p[1])}
    complete = [step for step, name in files if name == "manifest.json"]
    return sorted(complete, reverse=True), sorted({step for step, _ in files})


def _first_start(text: bytes | None) -> str | None:
    """Return the first line of a starts.jsonl, which tells runs of the same name from each other."""
    lines = (text or b"").decode(errors="replace").splitlines()
    return lines[0] if lines else None


def _read_local(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


class RunCopy:
    """Copy of a run folder in a store.

    Args:
        folder: The run folder.
        url: Folder in which the copy is.
        log: Function that prints a line.
    """

    def __init__(self, folder: Path, url: str, log: Callable[[str], None]):
        self.folder, self.log = folder, log
        self.store = Store(f"{check_url(url, 'save.copy_to')}/{folder.name}")
        self.sent: dict[str, tuple[int, int]] = {}  # record -> its time of change and its size
        self.complete: set[str] = set()  # names of the checkpoints that this process has copied
        self.has_failed = False

    def check(self) -> None:
        """Check before anything is written that the copy can be, and that no other run is there.

        Raises:
            UserError: If not.
        """
        store = self.store
        if store.local:
            own, there = self.folder.resolve(), Path(store.root).resolve()
            if own == there or own in there.parents or there in own.parents:
                raise UserError(f"save.copy_to copies the run {own} into itself ({there}); give another folder")
        try:
            first, holds_run = _first_start(store.read("starts.jsonl")), store.read("experiment.json") is not None
            newest = next(iter(steps_in(store.names())[0]), "")
            store.write(".probe", b"")
            store.remove(".probe")
        except Exception as e:  # every file system has its own errors
            raise UserError(
                f"cannot write {store.url}: {reason_of(e)}; create the bucket or folder, check the credentials, or leave "
                f"out save.copy_to"
            ) from None
        if (first or holds_run or newest) and first != _first_start(_read_local(self.folder / "starts.jsonl")):
            raise UserError(
                f"{store.url} already holds another run; continue that one with --resume {store.url}, or set another name=... "
                f"or save.copy_to=..."
            )
        own_newest = max((path.name for path in checkpoints.all_steps(self.folder / "checkpoints")), default="")
        if newest > own_newest:
            raise UserError(
                f"{store.url} is ahead of {self.folder}: it has {newest}; continue it with --resume {store.url}, or set "
                f"another save.copy_to=..."
            )

    def update(self) -> None:
        """Copy everything that the store lacks, and remove the checkpoints that the folder no longer has.

        A store that cannot be reached does not end the training: it is tried again at the next checkpoint.
        """
        try:
            self._update()
        except Exception as e:  # every file system has its own errors
            if not self.has_failed:
                self.log(
                    f"cannot copy the run to {self.store.url}: {reason_of(e)}; check the store. Training goes on, and the copy "
                    f"is tried again at the next checkpoint"
                )
            self.has_failed = True
        else:
            if self.has_failed:
                self.log(f"the run is copied to {self.store.url} again")
            self.has_failed = False

    def _update(self) -> None:
        for name, path in self._records().items():  # before a manifest, so that the logs reach its step
            state = path.stat()
            if self.sent.get(name) != (state.st_mtime_ns, state.st_size):
                self.store.write(name, path.read_bytes())
                self.sent[name] = state.st_mtime_ns, state.st_size
        kept = checkpoints.all_steps(self.folder / "checkpoints")
        for path in kept:
            if path.name not in self.complete:
                self._copy_checkpoint(path)
        for step in steps_in(self.store.names())[1]:
            if kept and step not in {path.name for path in kept}:
                if self.store.read(f"checkpoints/{step}/manifest.json") is not None:
                    self.store.remove(f"checkpoints/{step}/manifest.json")
                self.store.remove(f"checkpoints/{step}")

    def _records(self) -> dict[str, Path]:
        """Return the files other than checkpoints by their names in the copy."""
        paths = [path for path in self.folder.glob("[!.]*") if path.suffix not in (".lock", ".tmp")]
        paths += [path for name in FOLDERS for path in (self.folder / name).rglob("[!.]*") if path.suffix != ".tmp"]
        paths.append(self.folder / BEST)
        return {p.relative_to(self.folder).as_posix(): p for p in paths if p.is_file() and not p.is_symlink()}

    def _copy_checkpoint(self, path: Path) -> None:
        name = f"checkpoints/{path.name}"
        manifest, there = (path / "manifest.json").read_bytes(), self.store.read(f"{name}/manifest.json")
        if there != manifest:
            if there is not None:
                self.store.remove(f"{name}/manifest.json")
            for file in checkpoints.recorded_hashes(path):
                self.store.upload(path / file, f"{name}/{file}")
            self.store.write(f"{name}/manifest.json", manifest)
        self.complete.add(path.name)


def fetch_run(url: str, output: Path) -> Path:
    """Copy a run with its newest complete checkpoint and its best one from a store to ``output/NAME``; return that folder.

    A folder of the same run that has this checkpoint already is not changed, and one that is behind keeps its other files. Of
    several processes one fetches.

    Raises:
        UserError: If there is no such run, it has no complete checkpoint, or the folder holds another run.
    """
    url = check_url(url, "--resume")
    store, name = Store(url), url.rpartition("/")[2]
    folder = output / name
    try:
        if store.read("experiment.json") is None:
            raise UserError(f"{url} is not a run: it has no experiment.json; check the URL")
        with locked(output / f".{name}.fetch.lock"):
            return _fetch(store, folder)
    except UserError:
        raise
    except Exception as e:  # every file system has its own errors
        raise UserError(f"cannot fetch {url} to {folder}: {reason_of(e)}; check the URL and the credentials") from None


def _fetch(store: Store, folder: Path) -> Path:
    names = store.names()
    steps, _ = steps_in(names)
    is_there = (folder / "experiment.json").exists()
    if is_there:
        if _first_start(_read_local(folder / "starts.jsonl")) != _first_start(store.read("starts.jsonl")):
            raise UserError(f"{folder} already holds another run than {store.url}; set output=FOLDER for another place")
        own = checkpoints.newest_whole(folder / "checkpoints")
        if own is not None and (not steps or own.name >= steps[0]):
            return folder
    temporary = folder.with_name(f".{folder.name}.fetch.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        newest = _download_newest(store, steps, temporary)
        best = json.loads(store.read(BEST) or b"null")
        if isinstance(best, dict) and isinstance(best.get("step"), int):
            name = checkpoints.step_path(Path(), best["step"]).name
            if name in steps and name != newest:
                _download_checkpoint(store, name, temporary)
        for name in names:
            is_record = "/" not in name or name.split("/")[0] in FOLDERS or name == BEST
            if is_record and not any(part.startswith(".") for part in name.split("/")):
                store.download(name, temporary / name)
        if is_there:
            _merge(temporary, folder)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _merge(fetched: Path, folder: Path) -> None:
    """Move a newer state of a run into its folder, which keeps its other files. Nobody may train in it meanwhile."""
    with RunLock(folder) as lock:
        lock.acquire()
        # a checkpoint last: a log that is longer than the newest checkpoint is truncated when the run is resumed
        paths = [
            path
            for path in fetched.rglob("*")
            if path.is_file() and path.relative_to(fetched).parts[0] != "checkpoints"
        ]
        paths += [*checkpoints.all_steps(fetched / "checkpoints")[::-1], fetched / BEST]
        for path in filter(os.path.exists, paths):
            target = folder / path.relative_to(fetched)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                checkpoint.remove(target)
            os.replace(path, target)


def _download_newest(store: Store, steps: list[str], folder: Path) -> str:
    """Download the newest undamaged checkpoint; return its name."""
    for step in steps:
        problem = _download_checkpoint(store, step, folder)
        if problem is None:
            return step
        warnings.warn(f"damaged checkpoint in {store.url}: {step}: {problem}", stacklevel=2)
        shutil.rmtree(folder / "checkpoints" / step)
    raise UserError(f"{store.url} has no complete checkpoint to continue from; train the run from its start")


def _download_checkpoint(store: Store, step: str, folder: Path) -> str | None:
    """Download a checkpoint; return a description of its damage, or None."""
    path = folder / "checkpoints" / step
    path.mkdir(parents=True, exist_ok=True)
    (path / "manifest.json").write_bytes(store.read(f"checkpoints/{step}/manifest.json") or b"")
    try:
        names = list(checkpoints.recorded_hashes(path))
    except (ValueError, KeyError, TypeError):
        return "manifest.json is not readable"
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", name):
            return f"its manifest names {name!r}"
        try:
            store.download(f"checkpoints/{step}/{name}", path / name)
        except FileNotFoundError:
            return f"{name} is missing"
    return checkpoints.damage(path)
