"""Paraphrases kept in a file: sentences translated there and back (CERT), or captions that describe one picture."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vlp.errors import UserError
from vlp.files import write_atomically

Translator = Callable[[list[str]], list[str]]  # as many sentences as it is given, in their order
HEADER = "sentence\tparaphrase\n"


class Seq2Seq:
    """A translation model of transformers in a local folder, such as MarianMT, with its folder's way of decoding.

    Raises UserError if transformers cannot load model or tokenizer from it.
    """

    def __init__(self, folder: str):
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModelForSeq2SeqLM.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:  # Marian's own tokenizer needs the package sentencepiece
            reason = " ".join(str(error).split())
            raise UserError(f"{folder} is no translation model that transformers can load: {reason}") from error
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @torch.inference_mode()
    def __call__(self, sentences: list[str]) -> list[str]:
        given = self.tokenizer(sentences, return_tensors="pt", padding=True, truncation=True).to(self.model.device)
        return self.tokenizer.batch_decode(self.model.generate(**given), skip_special_tokens=True)


def load_translator(name: str) -> Translator:
    """``module:function``, or the folder of a transformers translation model.

    Raises:
        UserError: if it is neither.
    """
    if Path(name).is_dir():
        return Seq2Seq(name)
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"no translator {name}: it is no folder, and as module:function it cannot be imported ({error})"
        ) from None


def back_translate(
    sentences: Sequence[str],
    names: Sequence[str],
    output: Path,
    batch_size: int = 32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the sentences and what the translators, applied in turn, make of them.

    A file under another name beside ``output`` grows batch by batch; called again with the same sentences and
    translators, it goes on there. Only when it is whole does it get its name. What comes back empty is left as it was.

    Raises:
        UserError: if there is an output already, or a translator does not return as many texts as it was given.
    """
    if output.exists():
        raise UserError(f"{output} is there already; remove it to translate anew, or give another name")
    translators = {name: load_translator(name) for name in names}
    digest = hashlib.sha256(json.dumps([list(names), list(sentences)]).encode()).hexdigest()
    output.parent.mkdir(parents=True, exist_ok=True)
    growing = output.with_name(f".{output.name}.{digest[:16]}.part")
    growing.touch()
    with open(growing, "r+b") as file:
        lines = file.read()
        file.truncate(file.seek(lines.rfind(b"\n") + 1))  # a line that was being written
        if not (whole := lines.count(b"\n")):
            file.write(HEADER.encode())
        for start in range(max(0, whole - 1), len(sentences), batch_size):
            progress(start, len(sentences))
            batch = texts = list(sentences[start : start + batch_size])
            for name in names:
                texts = translators[name](texts)
                if len(texts) != len(batch):
                    raise UserError(f"{name} made {len(texts)} texts of {len(batch)}; it must return one for each")
            file.write(b"".join(map(_row, batch, texts)))
            file.flush()
        os.fsync(file.fileno())
    os.replace(growing, output)
    progress(len(sentences), len(sentences))


def pair_captions(groups: Sequence[Sequence[str]], output: Path) -> int:
    """Writes the captions of each picture two by two, the first with the second and so on: each is used once.

    Returns:
        How many pairs there are.
    """
    pairs = [pair for captions in groups for pair in zip(captions[::2], captions[1::2])]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, HEADER.encode() + b"".join(_row(*pair) for pair in pairs))
    return len(pairs)


def _row(sentence: str, paraphrase: str) -> bytes:
    """A line of the table, whose cells hold neither tabs nor ends of lines."""
    sentence, paraphrase = " ".join(sentence.split()), " ".join(paraphrase.split())
    return f"{sentence}\t{paraphrase or sentence}\n".encode()
