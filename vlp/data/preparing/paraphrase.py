"""Tables of paraphrases: back-translated sentences (CERT), or captions of the same image."""

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

Translator = Callable[[list[str]], list[str]]  # one output per input, in the same order
HEADER = "sentence\tparaphrase\n"


class Seq2Seq:
    """Translation model in a local transformers folder, such as MarianMT, with the generation settings of the folder.

    Raises:
        UserError: if transformers cannot load the model or its tokenizer.
    """

    def __init__(self, folder: str):
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModelForSeq2SeqLM.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:  # Marian's own tokenizer needs the package sentencepiece
            reason = " ".join(str(error).split())
            raise UserError(f"{folder} is not a translation model that transformers can load: {reason}") from error
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @torch.inference_mode()
    def __call__(self, sentences: list[str]) -> list[str]:
        given = self.tokenizer(sentences, return_tensors="pt", padding=True, truncation=True).to(self.model.device)
        return self.tokenizer.batch_decode(self.model.generate(**given), skip_special_tokens=True)


def load_translator(name: str) -> Translator:
    """Load ``module:function``, or the folder of a transformers translation model.

    Raises:
        UserError: if ``name`` is neither.
    """
    if Path(name).is_dir():
        return Seq2Seq(name)
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"no translator {name}: it is not a folder, and cannot be imported as module:function ({error})"
        ) from None


def back_translate(
    sentences: Sequence[str],
    names: Sequence[str],
    output: Path,
    batch_size: int = 32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a table of the sentences and their translations by all translators in turn.

    A temporary file next to ``output`` grows batch by batch. A second call with the same sentences and translators
    continues it. It is renamed to ``output`` when it is complete. An empty translation is replaced by its sentence.

    Raises:
        UserError: if the output exists, or a translator does not return one text per input.
    """
    if output.exists():
        raise UserError(f"{output} exists; remove it to translate again, or give another name")
    translators = {name: load_translator(name) for name in names}
    digest = hashlib.sha256(json.dumps([list(names), list(sentences)]).encode()).hexdigest()
    output.parent.mkdir(parents=True, exist_ok=True)
    growing = output.with_name(f".{output.name}.{digest[:16]}.part")
    growing.touch()
    with open(growing, "r+b") as file:
        lines = file.read()
        file.truncate(file.seek(lines.rfind(b"\n") + 1))  # drop a partly written line
        if not (whole := lines.count(b"\n")):
            file.write(HEADER.encode())
        for start in range(max(0, whole - 1), len(sentences), batch_size):
            progress(start, len(sentences))
            batch = texts = list(sentences[start : start + batch_size])
            for name in names:
                texts = translators[name](texts)
                if len(texts) != len(batch):
                    raise UserError(f"{name} returned {len(texts)} texts for {len(batch)}; it must return one per text")
            file.write(b"".join(map(_row, batch, texts)))
            file.flush()
        os.fsync(file.fileno())
    os.replace(growing, output)
    progress(len(sentences), len(sentences))


def pair_captions(groups: Sequence[Sequence[str]], output: Path) -> int:
    """Write the captions of each image as pairs: first and second, third and fourth, and so on; each is used once.

    Returns:
        The number of pairs.
    """
    pairs = [pair for captions in groups for pair in zip(captions[::2], captions[1::2])]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, HEADER.encode() + b"".join(_row(*pair) for pair in pairs))
    return len(pairs)


def _row(sentence: str, paraphrase: str) -> bytes:
    """Return a line of the table; tabs and line breaks in its cells become spaces."""
    sentence, paraphrase = " ".join(sentence.split()), " ".join(paraphrase.split())
    return f"{sentence}\t{paraphrase or sentence}\n".encode()
