"""Captions -> token ids. B captions, L tokens of the longest.

Two tokenizers meet one protocol: called with captions and a limit, they return ids, mask and the number of captions
that were cut; they have ``vocab_size, pad_id, cls_id, sep_id, mask_id``; ``save`` writes what `load_tokenizer` reads.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from vlp.data.shards import write_atomically
from vlp.errors import UserError
from vlp.files import resolve
from vlp.types import Vocabulary

# Data workers run beside each other: threads of their own would only wait for one another, and after a fork the library
# would warn of a deadlock.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MAX_CHARACTERS = 1000  # of a trained vocabulary; rarer ones are unknown
SPECIAL = {"pad": ("[PAD]", "<pad>"), "cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "mask": ("[MASK]", "<mask>")}
OPEN_CLIP_FILE = "open_clip_tokenizer.json"


class Tokenizer:
    """Any tokenizer of the ``tokenizers`` library, such as BERT's WordPiece, with ``[CLS]`` first.

    Args:
        backend: splits text into ids; its own truncation, padding and special tokens are replaced.
        sep: whether ``[SEP]`` ends a caption. BERT's convention; ALBEF's weights were trained without it.
        clean: whether captions go through `clean_caption` first, its limit of words apart; kept in what ``save`` writes. What is
            to be generated does not: an answer is as it is written.
    """

    def __init__(self, backend: tokenizers.Tokenizer, sep: bool = True, clean: bool = False):
        self.sep = sep
        self._backend = backend
        if clean:
            backend.normalizer = normalizers.Sequence([*_cleaning(), *filter(None, [backend.normalizer])])
        found = {name: _first_known(backend, tokens) for name, tokens in SPECIAL.items()}
        missing = [SPECIAL[name][0] for name in ("pad", "cls", "sep") if found[name] is None]
        if missing:
            raise UserError(f"the tokenizer has no token {' or '.join(missing)}; use a BERT-like one, or train one")
        self.pad_id, self.cls_id, self.sep_id, self.mask_id = found.values()
        if isinstance(backend.model, models.WordPiece) and backend.decoder is None:
            backend.decoder = decoders.WordPiece()
        cls, last = backend.id_to_token(self.cls_id), backend.id_to_token(self.sep_id)
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {last}" if sep else f"{cls} $A", special_tokens=[(cls, self.cls_id), (last, self.sep_id)]
        )
        self._as_written = _without_cleaning(backend)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size()

    def rows(self, captions: Sequence[str]) -> list[list[int]]:
        """Ids of each caption, special tokens included, neither cut nor padded."""
        return [encoding.ids for encoding in self._backend.encode_batch(list(captions))]

    def words(self, caption: str) -> list[tuple[str, list[int]]]:
        """The words as they are written, each with the places of its pieces in the caption's ids; punctuation is one too."""
        encoding = self._backend.encode(caption)
        places: dict[int, list[int]] = {}
        for place, word in enumerate(encoding.word_ids):
            if word is not None:
                places.setdefault(word, []).append(place)
        spans = ((encoding.offsets[p[0]][0], encoding.offsets[p[-1]][1], p) for p in places.values())
        return [(caption[begin:end].strip(), own) for begin, end, own in spans]

    def __call__(self, captions: Sequence[str], max_length: int) -> tuple[Tensor, Tensor, int]:
        """Ids padded to the longest caption; a longer one than ``max_length`` is cut, keeping its ``[SEP]``.

        Returns:
            (B, L) int64 ids; (B, L) bool, True where there is a token; how many captions were cut.
        """
        return self.pad(self.rows(captions), max_length)

    def pad(self, rows: list[list[int]], max_length: int) -> tuple[Tensor, Tensor, int]:
        """As `__call__`, of rows of ids."""
        return pad(rows, max_length, self.pad_id, keep_last=self.sep)

    def target_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """As `rows`, of what is to be generated: as it is written, ``[SEP]`` at its end, whatever captions lose or end in."""
        rows = [encoding.ids for encoding in self._as_written.encode_batch(list(texts))]
        return rows if self.sep else [[*row, self.sep_id] for row in rows]

    def targets(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor, int]:
        """As `__call__`, of `target_rows`."""
        return pad(self.target_rows(texts), max_length, self.pad_id, keep_last=True)

    def text(self, ids: Sequence[int]) -> str:
        """What ids say, special tokens left out."""
        return self._backend.decode(list(ids)).strip()

    def vocabulary(self) -> Vocabulary:
        """A piece continues a word by WordPiece's ``##``; where pieces mark the begin instead (RoBERTa), by its lack."""
        tokens = [self._backend.id_to_token(i) or "" for i in range(self.vocab_size)]
        added = self._backend.get_added_tokens_decoder()
        special = torch.tensor([i in added and added[i].special for i in range(self.vocab_size)])
        special[[self.pad_id, self.cls_id, self.sep_id]] = True
        if begins := next((mark for mark in ("\u0120", "\u2581") if any(t.startswith(mark) for t in tokens)), None):
            continues = torch.tensor([not t.startswith(begins) for t in tokens]) & ~special
        else:
            continues = torch.tensor([t.startswith("##") for t in tokens])
        return Vocabulary(self.vocab_size, self.mask_id, special, continues)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "tokenizer.json", self._backend.to_str(pretty=True).encode())


class OpenClipTokenizer:
    """The byte-pair encoding of open_clip's model ``name``: ``[CLS]`` is its start token, ``[SEP]`` its end token.

    Raises:
        UserError: for an unknown name, and for models whose tokenizer would come from a hub.
    """

    mask_id = None
    pad_id = 0  # also the id of "!": only the mask tells them apart

    def __init__(self, name: str):
        import open_clip

        config = open_clip.get_model_config(name)
        if config is None:
            raise UserError(f"open_clip has no model {name!r}; `open_clip.list_models()` names them")
        if "hf_tokenizer_name" in config["text_cfg"]:
            hub_name = config["text_cfg"]["hf_tokenizer_name"]
            raise UserError(f"the tokenizer of open_clip's {name} is {hub_name} on a hub; give a local folder with it")
        self.name = name
        self._bpe = open_clip.get_tokenizer(name)
        self.vocab_size, self.context = self._bpe.vocab_size, self._bpe.context_length
        self.cls_id, self.sep_id = self._bpe.sot_token_id, self._bpe.eot_token_id

    def __reduce__(self):
        return OpenClipTokenizer, (self.name,)  # the vocabulary stays in the package

    def rows(self, captions: Sequence[str]) -> list[list[int]]:
        """Ids of each caption, special tokens included, neither cut nor padded."""
        return [[self.cls_id, *self._bpe.encode(caption), self.sep_id] for caption in captions]

    def __call__(self, captions: Sequence[str], max_length: int) -> tuple[Tensor, Tensor, int]:
        """As `Tokenizer.__call__`; the limit is at most the model's context, and the end token is kept."""
        return self.pad(self.rows(captions), max_length)

    def pad(self, rows: list[list[int]], max_length: int) -> tuple[Tensor, Tensor, int]:
        """As `__call__`, of rows of ids."""
        return pad(rows, min(max_length, self.context), self.pad_id, keep_last=True)

    target_rows, targets = rows, __call__  # they end in the end token already

    def text(self, ids: Sequence[int]) -> str:
        """What ids say, special tokens left out."""
        return self._bpe.decode([i for i in ids if i not in (self.cls_id, self.sep_id)]).strip()

    def vocabulary(self) -> Vocabulary:
        """A piece that does not end its word is continued by the next, so words are not told apart: none continues."""
        special = torch.zeros(self.vocab_size, dtype=torch.bool)
        special[[self.cls_id, self.sep_id]] = True
        return Vocabulary(self.vocab_size, None, special, torch.zeros_like(special))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OPEN_CLIP_FILE).write_text(json.dumps({"name": self.name}))


def pad(rows: list[list[int]], max_length: int, pad_id: int, keep_last: bool) -> tuple[Tensor, Tensor, int]:
    """(B, L) int64 ids, (B, L) bool mask and the number of rows that were longer than ``max_length``."""
    lengths = np.array([min(len(row), max_length) for row in rows])
    ids = np.full((len(rows), lengths.max(initial=0)), pad_id, dtype=np.int64)
    cut = 0
    for line, row, length in zip(ids, rows, lengths):
        line[:length] = row[:length]
        if length < len(row):
            cut += 1
            if keep_last:
                line[length - 1] = row[-1]
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    return torch.from_numpy(ids), torch.from_numpy(mask), cut


def _first_known(backend: tokenizers.Tokenizer, tokens: Iterable[str]) -> int | None:
    return next((backend.token_to_id(t) for t in tokens if backend.token_to_id(t) is not None), None)


def load_tokenizer(path: str, sep: bool | None = None, clean: bool = False) -> Tokenizer | OpenClipTokenizer:
    """A tokenizer from local files.

    Args:
        path: a folder with tokenizer.json or vocab.txt, as transformers and `Tokenizer.save` write it; one of these
            files; ``pip:PACKAGE/path`` for either inside an installed package; or ``open_clip:MODEL``.
        sep: whether ``[SEP]`` ends a caption; None = as the file says, and for a vocabulary, yes.
        clean: see `Tokenizer`.

    Raises:
        UserError: if nothing is there, it is not a tokenizer, or one that cannot clean.
    """
    if path.startswith("open_clip:"):
        if clean:
            raise UserError(f"{path} reads captions as they are; set data.clean=false")
        return OpenClipTokenizer(path.removeprefix("open_clip:"))
    file = found = resolve(path)
    if found.is_dir():
        names = ("tokenizer.json", "vocab.txt", OPEN_CLIP_FILE)
        file = next((found / name for name in names if (found / name).is_file()), None)
        if file is None:
            raise UserError(f"{path} holds no tokenizer.json and no vocab.txt; give the folder of a fast tokenizer")
    if file.name == OPEN_CLIP_FILE:
        return OpenClipTokenizer(json.loads(file.read_text())["name"])
    try:
        backend = _from_vocabulary(file) if file.suffix == ".txt" else tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{file} is not a tokenizer ({error}); give a tokenizer.json or a vocab.txt") from None
    if sep is None:
        own = backend.encode("").ids  # what the file puts around an empty caption: [CLS] [SEP], [CLS] alone, or nothing
        sep = len(own) != 1
    return Tokenizer(backend, sep, clean)


def _from_vocabulary(file: Path) -> tokenizers.Tokenizer:
    """BERT's WordPiece over a vocab.txt; lower-case unless a tokenizer_config.json beside it says otherwise."""
    tokens = file.read_text(encoding="utf-8").splitlines()
    if "[UNK]" not in tokens:
        raise ValueError("it has no line [UNK]")
    config = file.with_name("tokenizer_config.json")
    lowercase = json.loads(config.read_text()).get("do_lower_case", True) if config.is_file() else True
    backend = _wordpiece({token: i for i, token in enumerate(tokens)}, lowercase)
    backend.add_special_tokens([token for names in SPECIAL.values() for token in names if token in tokens])
    return backend


def _wordpiece(vocabulary: dict[str, int], lowercase: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def train_tokenizer(
    captions: Iterable[str], vocab_size: int = 30_000, min_frequency: int = 2, lowercase: bool = True, sep: bool = True
) -> Tokenizer:
    """WordPiece learned from ``captions``: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, then characters and pieces.

    ``vocab_size`` is an upper limit; pieces seen fewer than ``min_frequency`` times are not merged.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    captions, counts = list(captions), Counter()
    untrained = _wordpiece({token: i for i, token in enumerate(special)}, lowercase)
    for caption in captions:
        counts.update(untrained.normalizer.normalize_str(caption))
    kept = sorted(counts, key=lambda c: (-counts[c], c))[:MAX_CHARACTERS]
    alphabet = sorted(c for c in kept if not c.isspace())
    # Left to itself the trainer numbers the "##" characters in the order of a hash map, and breaks ties of frequency by
    # these numbers: every run would give another vocabulary. Given beforehand, they are the same every time.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special + alphabet + [f"##{c}" for c in alphabet],
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    untrained.train_from_iterator(captions, trainer)
    trained = _wordpiece(untrained.get_vocab(), lowercase)
    trained.add_special_tokens(special)
    return Tokenizer(trained, sep)


REMOVED = r"[,.'!?\"()*#:;~]"


def _without_cleaning(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer without `_cleaning` in front, which may have been saved with it."""
    state, cleaning = json.loads(backend.to_str()), json.loads(normalizers.Sequence(_cleaning()).__getstate__())
    steps, first = (state["normalizer"] or {}).get("normalizers", []), cleaning["normalizers"]
    if steps[: len(first)] != first:
        return backend
    state["normalizer"] = {"type": "Sequence", "normalizers": steps[len(first) :]}
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _cleaning() -> list[normalizers.Normalizer]:
    """`clean_caption`, without the limit of words, in the words of the tokenizers library."""
    spaces = [normalizers.Replace(mark, " ") for mark in "-/"]
    removed = normalizers.Replace(tokenizers.Regex(REMOVED), "")
    return [normalizers.Lowercase(), removed, *spaces, normalizers.Replace("<person>", "person")]


def clean_caption(text: str, max_words: int = 30) -> str:
    """ALBEF's normalisation: lower-case, without ``,.'!?"()*#:;~``, spaces for ``-`` and ``/``, ``max_words`` at most.

    Conceptual Captions' ``<person>`` becomes "person".
    """
    text = re.sub(REMOVED, "", text.lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(text.split()[:max_words])
