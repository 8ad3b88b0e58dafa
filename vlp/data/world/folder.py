"""Writing scenes to a folder: images, shards, and annotations, with some captions swapped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from PIL import Image

from vlp.data.preparing.formats import Pair
from vlp.data.preparing.pack import pack
from vlp.data.world.pairs import paired
from vlp.data.world.scenes import Scene, World
from vlp.data.world.sentences import captions
from vlp.errors import UserError
from vlp.files import write_atomically

ANNOTATIONS = ("questions", "statements", "grounding", "pairs")  # .jsonl
MARK = "world.json"  # the arguments that made the folder
PARTS = ("train/manifest.json", "val/manifest.json", *(f"{name}.jsonl" for name in ANNOTATIONS))  # of a complete world
FIRST_VAL = 1_000_000_000  # number of the first scene of val, so that val does not depend on the size of train


def make(
    folder: Path,
    world: World | None = None,
    *,
    train: int,
    val: int,
    val_world: World | None = None,
    noise: float = 0.0,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write scenes as PNG files in ``folder``/pictures, and as shards in ``folder``/train and ``folder``/val.

    Annotation files are written next to them. They are true of the image, with any noise:

    - questions.jsonl and statements.jsonl: ``key`` of the sample, ``text``, ``answer`` (a word, or true or false), ``split``.
    - pairs.jsonl: statements about two samples, see `vlp.data.world.pairs`.
    - grounding.jsonl: name of a thing (``text``), its ``box``, and ``proposals``, the boxes of all things of the image, as
      (left, top, width, height) in pixels.
    - world.json: the arguments of this function.

    The json of a sample contains number, contrast, minimal_pair, things and relations of the scene, and captions_of: the
    key of the sample that its captions describe, which is another sample if they were swapped.

    The result is the same for any number of workers. A smaller number of scenes is a prefix of a larger one, and the
    samples swapped at a lower noise are a subset of those at a higher one. In val no two things have the same relation in
    two images, so that a caption describes one image only (8 of 1000 describe two). A large val therefore has fewer scenes
    with "inside", which are the rarest. A complete folder is not changed, and an incomplete one is completed.

    Args:
        world: None selects the default world.
        train: Number of scenes; even, because scenes come in minimal pairs.
        val: Number of scenes; even.
        val_world: The world of val. None selects that of train.
        noise: Share of train's samples that have the captions of another one.
        workers: Number of packing processes.
        progress: Called with (scenes drawn + scenes packed, total of both).

    Returns:
        ``folder``.

    Raises:
        UserError: if a number is out of range, ``folder`` contains something else or cannot be written, or the world has
            too few different scenes for val.
    """
    world, folder = world or World(), Path(folder)
    if not 2 <= train <= FIRST_VAL or val < 2 or train % 2 or val % 2:
        raise UserError(
            f"{train} scenes of train and {val} of val are not possible; give even numbers, because scenes come in pairs"
        )
    if not 0 <= noise <= 1 or seed < 0:
        raise UserError(
            f"noise {noise} with seed {seed} is not possible; give a share from 0 to 1, and a seed of 0 or more"
        )
    worlds = {"train": world, "val": val_world or world}
    arguments = {"world": asdict(world), "train": train, "val": val, "noise": noise, "seed": seed}
    if worlds["val"] != world:
        arguments["val_world"] = asdict(worlds["val"])
    total = 2 * (train + val)
    try:
        if _complete(folder, arguments, PARTS):
            return folder
        numbers = {"train": range(train), "val": list(_val_numbers(worlds["val"], val, seed))}
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / MARK, json.dumps(arguments, indent=1).encode())
        pairs: dict[str, list[Pair]] = {"train": [], "val": []}
        files: dict[str, list[dict]] = {name: [] for name in ANNOTATIONS}
        done = 0
        for split in pairs:
            scenes = []
            for pair, scene in _draw(worlds[split], seed, numbers[split], folder / "pictures" / split):
                pairs[split].append(pair)
                scenes.append((pair.key, replace(scene, image=None)))
                for name, annotated in _annotations(scene).items():
                    files[name] += ({"key": pair.key, **line, "split": split} for line in annotated)
                progress(done := done + 1, total)
            files["pairs"] += ({**line, "split": split} for line in paired(scenes, seed))
        for name, lines in files.items():
            _write_lines(folder / f"{name}.jsonl", lines)
        pairs["train"] = _swap(pairs["train"], noise, seed)
        for split in pairs:
            pack(pairs[split], folder / split, None, workers, lambda n, _, done=done: progress(done + n, total))
            done += len(pairs[split])
    except OSError as e:
        raise _unwritable(folder, e) from None
    return folder


def make_single(
    folder: Path,
    world: World | None = None,
    *,
    train: int,
    val: int,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write images of single things, to train an image tower by classification before it sees scenes.

    Writes PNG files in ``folder``/pictures, shards of the training images in ``folder``/train, and labels.jsonl with the
    ``image``, ``label``, ``name`` and ``split`` of every image. Labels number `World.classes`. A sample's json has the
    label. The result is the same for any number of workers. A complete folder is not changed, and an incomplete one is
    completed.

    Args:
        world: None selects the default world.
        train: Number of training images.
        val: Number of other images to evaluate.
        workers: Number of packing processes.
        progress: Called with (images drawn + images packed, total of both).

    Returns:
        ``folder``.

    Raises:
        UserError: if a number is out of range, or ``folder`` contains something else or cannot be written.
    """
    world, folder = world or World(), Path(folder)
    if not 1 <= train <= FIRST_VAL or val < 1 or seed < 0:
        raise UserError(
            f"{train} training images, {val} others and seed {seed} are not possible; give positive numbers"
        )
    arguments = {"world": asdict(world), "single": train, "val": val, "seed": seed}
    try:
        if _complete(folder, arguments, ("train/manifest.json", "labels.jsonl")):
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / MARK, json.dumps(arguments, indent=1).encode())
        pairs, lines, total = [], [], 2 * train + val
        for split, first, count in (("train", 0, train), ("val", FIRST_VAL, val)):
            pictures = folder / "pictures" / split
            pictures.mkdir(parents=True, exist_ok=True)
            for row in range(count):
                image, label = world.single(seed, first + row)
                path, name = pictures / f"{split}-{row:06d}.png", world.classes[label]
                Image.fromarray(image).save(path)
                lines.append({"image": str(path.relative_to(folder)), "label": label, "name": name, "split": split})
                if split == "train":
                    pairs.append(Pair(str(path), (f"a {name}",), path.stem, "synthetic world", {"label": label}))
                progress(len(lines), total)
        _write_lines(folder / "labels.jsonl", lines)
        pack(pairs, folder / "train", None, workers, lambda n, _: progress(len(lines) + n, total))
    except OSError as e:
        raise _unwritable(folder, e) from None
    return folder


def _write_lines(path: Path, lines: Iterable[dict]) -> None:
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _unwritable(folder: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"cannot write {folder} ({reason}); free some space, or choose another folder")


def _read_mark(path: Path) -> dict | None:
    """Return the arguments that made a folder, None if the file is damaged. Older files lack newer fields of a world."""
    try:
        arguments = json.loads(path.read_text())
        return arguments | {"world": json.loads(json.dumps(asdict(World()))) | arguments["world"]}
    except (ValueError, TypeError, KeyError):
        return None


def _complete(folder: Path, arguments: dict, parts: Sequence[str]) -> bool:
    """Return whether the folder has all its parts. Raise UserError if it contains anything else."""
    mark = folder / MARK
    if mark.is_file():
        if _read_mark(mark) != json.loads(json.dumps(arguments)):
            raise UserError(f"{folder} contains another world, see {mark}; remove it or choose another folder")
        return all((folder / part).is_file() for part in parts)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not a world; remove it or choose another folder")
    return False


def _annotations(scene: Scene) -> dict[str, list[dict]]:
    """Return the lines about one scene for each annotation file."""
    named = zip((f"the {t.colour} {t.shape}" for t in scene.things), scene.boxes)
    return {
        "questions": [{"text": text, "answer": answer} for text, answer in scene.questions],
        "statements": [{"text": text, "answer": answer} for text, answer in scene.statements],
        "grounding": [{"text": text, "box": box, "proposals": scene.boxes} for text, box in named],
    }


def _draw(world: World, seed: int, numbers: Iterable[int], folder: Path) -> Iterator[tuple[Pair, Scene]]:
    """Write the images of a split and yield its pairs and scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    for row, number in enumerate(numbers):
        scene, key = world.scene(seed, number), f"{folder.name}-{row:06d}"
        Image.fromarray(scene.image).save(folder / f"{key}.png")
        extra = {
            "number": number,
            "contrast": scene.contrast,
            "minimal_pair": scene.minimal_pair,
            "things": [
                {"shape": t.shape, "colour": t.colour, "size": t.size, "x": t.x, "y": t.y} for t in scene.things
            ],
            "relations": scene.relations,
            "captions_of": key,
        }
        yield Pair(str(folder / f"{key}.png"), scene.captions, key, "synthetic world", extra), scene


def _val_numbers(world: World, count: int, seed: int) -> Iterator[int]:
    """Yield numbers of scenes that share no relation of two things, so that no caption is true of two images."""
    seen: set[str] = set()
    number, fruitless = FIRST_VAL, 0
    while count:
        pair = [world.scene(seed, n) for n in (number, number + 1)]
        links = {
            text
            for scene in pair
            for first, relation, second in zip(scene.things, scene.relations, scene.things[1:])
            for text in captions((first, second), (relation,))
        }
        if seen.isdisjoint(links):
            yield from (number, number + 1)
            seen |= links
            count, fruitless = count - 2, 0
        elif (fruitless := fruitless + 1) > 1000:
            raise UserError("this world has too few different scenes for a val of this size; make it smaller")
        number += 2


def _swap(pairs: list[Pair], noise: float, seed: int) -> list[Pair]:
    """Rotate the captions among a random share ``noise`` of the pairs."""
    swapped = np.random.default_rng([seed, 0, 1]).permutation(len(pairs))[: round(noise * len(pairs))]
    pairs = list(pairs)
    for to, of in zip(swapped, [pairs[n] for n in np.roll(swapped, 1)]):
        pairs[to] = replace(pairs[to], captions=of.captions, extra=pairs[to].extra | {"captions_of": of.key})
    return pairs
