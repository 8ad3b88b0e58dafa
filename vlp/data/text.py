"""Tokenizers. B captions, L tokens of the longest caption.

`Tokenizer` and `OpenClipTokenizer` share one protocol. Called with captions and a limit, they return ids, a mask, and the
number of truncated captions. They have ``vocab_size, pad_id, cls_id, sep_id, mask_id``. ``save`` writes a file that
`load_tokenizer` reads.
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

from vlp.data.reading.tables import read_json, read_text
from vlp.errors import UserError
from vlp.files import resolve, write_atomically
from vlp.types import Vocabulary

# Data workers run in parallel, so threads inside each would only compete, and after a fork the library warns of a
# deadlock.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MAX_CHARACTERS = 1000  # alphabet of a trained vocabulary; rarer characters become [UNK]
SPECIAL = {"pad": ("[PAD]", "<pad>"), "cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "mask": ("[MASK]", "<mask>")}
SPECIAL_TOKEN = re.compile(r"[\[<].*[\]>]", re.DOTALL)
OPEN_CLIP_FILE = "open_clip_tokenizer.json"
MODEL_NAME = re.compile(
    r"[A-Za-z0-9][\w.-]*"
)  # no path, and no schema such as hf-hub:, from which open_clip would download


class Tokenizer:
    """Tokenizer of the ``tokenizers`` library, such as BERT's WordPiece, with ``[CLS]`` first.

    Args:
        backend: The library's tokenizer. Its truncation, padding and special tokens are replaced.
        sep: Append ``[SEP]`` to a caption, which is BERT's convention. ALBEF's weights were trained without it.
        clean: Apply `clean_caption` to captions first, without its limit of words. Texts to generate (`target_rows`) are
            not cleaned. ``save`` stores this setting.
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
        check_spelling(backend.get_vocab(), "the tokenizer")
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
        """Return the ids of each caption with special tokens, neither truncated nor padded."""
        return [encoding.ids for encoding in self._backend.encode_batch(list(captions))]

    def words(self, caption: str) -> list[tuple[str, list[int]]]:
        """Return the words of a caption as written, each with the indices of its pieces in the ids. Punctuation is a word."""
        encoding = self._backend.encode(caption)
        pieces: dict[int, list[int]] = {}
        for index, word in enumerate(encoding.word_ids):
            if word is not None:
                pieces.setdefault(word, []).append(index)
        spans = ((encoding.offsets[p[0]][0], encoding.offsets[p[-1]][1], p) for p in pieces.values())
        return [(caption[begin:end].strip(), own) for begin, end, own in spans]

    def __call__(self, captions: Sequence[str], max_length: int) -> tuple[Tensor, Tensor, int]:
        """Tokenize captions and pad them to the longest. A caption over ``max_length`` is truncated and keeps its ``[SEP]``.

        Returns:
            (B, L) int64 ids; (B, L) bool mask, True for a token; number of truncated captions.
        """
        return self.pad(self.rows(captions), max_length)

    def pad(self, rows: list[list[int]], max_length: int) -> tuple[Tensor, Tensor, int]:
        """Pad rows of ids as `__call__` does."""
        return pad(rows, max_length, self.pad_id, keep_last=self.sep)

    def target_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts to generate: not cleaned, and always with ``[SEP]`` at the end."""
        rows = [encoding.ids for encoding in self._as_written.encode_batch(list(texts))]
        return rows if self.sep else [[*row, self.sep_id] for row in rows]

    def targets(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor, int]:
        """Tokenize and pad texts to generate, see `target_rows` and `__call__`."""
        return pad(self.target_rows(texts), max_length, self.pad_id, keep_last=True)

    def text(self, ids: Sequence[int]) -> str:
        """Decode ids, without special tokens."""
        return self._backend.decode(list(ids)).strip()

    def vocabulary(self) -> Vocabulary:
        """Describe the vocabulary for masking.

        A piece continues a word if it has WordPiece's ``##``, or, in vocabularies that mark the begin of a word (RoBERTa),
        if it lacks that mark.
        """
        tokens = [self._backend.id_to_token(i) or "" for i in range(self.vocab_size)]
        added = self._backend.get_added_tokens_decoder()
        special = torch.tensor([i in added and added[i].special for i in range(self.vocab_size)])
        special[[self.pad_id, self.cls_id, self.sep_id]] = True
        if begins := next((mark for mark in ("\u0120", "\u2581") if any(t.startswith(mark) for t in tokens)), None):
            continues = torch.tensor([not t.startswith(begins) for t in tokens]) & ~special
        else:
            continues = torch.tensor([t.startswith("##") for t in tokens])
        return Vocabulary(self.vocab_size, self.mask_id, special, continues, self.pieces)

    def pieces(self, word: str) -> tuple[int, ...]:
        """Return the ids of a word, or of several, as written within a text. Empty if a character is unknown."""
        encoding = self._backend.encode(f"a {word}")  # vocabularies that mark the begin of a word do not mark the first
        ids = tuple(i for i, number in zip(encoding.ids, encoding.word_ids) if number)
        unknown = _first_known(self._backend, ("[UNK]", "<unk>"))
        return () if unknown in ids else ids

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "tokenizer.json", self._backend.to_str(pretty=True).encode())


class OpenClipTokenizer:
    """Byte-pair encoding of open_clip's model ``name``. Its start token is ``[CLS]``, its end token ``[SEP]``.

    Raises:
        UserError: if the name is unknown, or the model's tokenizer is on a hub.
    """

    mask_id = None
    pad_id = 0  # also the id of "!": the mask distinguishes them

    def __init__(self, name: str):
        import open_clip

        config = open_clip.get_model_config(name) if isinstance(name, str) and MODEL_NAME.fullmatch(name) else None
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
        """Return the ids of each caption with special tokens, neither truncated nor padded."""
        return [[self.cls_id, *self._bpe.encode(caption), self.sep_id] for caption in captions]

    def __call__(self, captions: Sequence[str], max_length: int) -> tuple[Tensor, Tensor, int]:
        """Tokenize as `Tokenizer.__call__` does. The limit is at most the model's context; the end token is kept."""
        return self.pad(self.rows(captions), max_length)

    def pad(self, rows: list[list[int]], max_length: int) -> tuple[Tensor, Tensor, int]:
        """Pad rows of ids as `__call__` does."""
        return pad(rows, min(max_length, self.context), self.pad_id, keep_last=True)

    target_rows, targets = rows, __call__  # rows already end with the end token

    def text(self, ids: Sequence[int]) -> str:
        """Decode ids, without special tokens."""
        return self._bpe.decode([i for i in ids if i not in (self.cls_id, self.sep_id)]).strip()

    def vocabulary(self) -> Vocabulary:
        """Describe the vocabulary for masking. This encoding marks the end of a word, so no piece counts as a continuation."""
        special = torch.zeros(self.vocab_size, dtype=torch.bool)
        special[[self.cls_id, self.sep_id]] = True
        return Vocabulary(self.vocab_size, None, special, torch.zeros_like(special), self.pieces)

    def pieces(self, word: str) -> tuple[int, ...]:
        """Return the ids of a word."""
        return tuple(self._bpe.encode(word))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OPEN_CLIP_FILE).write_text(json.dumps({"name": self.name}))


def pad(rows: list[list[int]], max_length: int, pad_id: int, keep_last: bool) -> tuple[Tensor, Tensor, int]:
    """Pad rows of ids to the longest.

    Returns:
        (B, L) int64 ids; (B, L) bool mask; number of rows that were truncated to ``max_length``.
    """
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


def check_spelling(tokens: Iterable[str], name: str) -> None:
    """Refuse a vocabulary of hardly more than special tokens, with which all texts look the same.

    transformers makes such a tokenizer for a folder without tokenizer files.

    Args:
        tokens: The vocabulary.
        name: Name of the tokenizer, for the message.

    Raises:
        UserError: if fewer than two tokens are parts of words.
    """
    words = [t for t in tokens if not SPECIAL_TOKEN.fullmatch(t) and any(map(str.isalnum, t))]
    if len(words) < 2:
        raise UserError(f"{name} has only special tokens and cannot spell a text; fetch the tokenizer's files too")


def _first_known(backend: tokenizers.Tokenizer, tokens: Iterable[str]) -> int | None:
    return next((backend.token_to_id(t) for t in tokens if backend.token_to_id(t) is not None), None)


def load_tokenizer(path: str, sep: bool | None = None, clean: bool = False) -> Tokenizer | OpenClipTokenizer:
    """Load a tokenizer from local files.

    Args:
        path: A folder with tokenizer.json or vocab.txt, as transformers and `Tokenizer.save` write it; one of these
            files; ``pip:PACKAGE/path`` for either inside an installed package; or ``open_clip:MODEL``.
        sep: Append ``[SEP]`` to a caption. None follows tokenizer.json; a vocab.txt always gets ``[SEP]``.
        clean: See `Tokenizer`.

    Raises:
        UserError: if the path does not exist, is not a tokenizer, or cannot clean captions.
    """
    if path.startswith("open_clip:"):
        if clean:
            raise UserError(f"{path} cannot clean captions; set data.clean_captions=false")
        return OpenClipTokenizer(path.removeprefix("open_clip:"))
    file = found = resolve(path)
    if found.is_dir():
        names = ("tokenizer.json", "vocab.txt", OPEN_CLIP_FILE)
        file = next((found / name for name in names if (found / name).is_file()), None)
        if file is None:
            raise UserError(f"{path} has neither tokenizer.json nor vocab.txt; give the folder of a fast tokenizer")
    if file.name == OPEN_CLIP_FILE:
        content = read_json(file)
        return OpenClipTokenizer(content.get("name") if isinstance(content, dict) else None)
    try:
        backend = _from_vocabulary(file) if file.suffix == ".txt" else tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{file} is not a tokenizer ({error}); give a tokenizer.json or a vocab.txt") from None
    if sep is None:
        own = backend.encode("").ids  # tokens around an empty caption: [CLS] [SEP], only [CLS], or none
        sep = len(own) != 1
    return Tokenizer(backend, sep, clean)


def _from_vocabulary(file: Path) -> tokenizers.Tokenizer:
    """Build BERT's WordPiece from a vocab.txt, lower-case unless the tokenizer_config.json next to it disables that."""
    tokens = read_text(file).replace("\r\n", "\n").rstrip("\n").split("\n")  # splitlines() would also split at U+2028
    if "[UNK]" not in tokens:
        raise ValueError("it has no line [UNK]")
    config = file.with_name("tokenizer_config.json")
    settings = read_json(config) if config.is_file() else {}
    lowercase = not isinstance(settings, dict) or settings.get("do_lower_case", True) is not False
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
    """Train WordPiece on captions: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, then characters and pieces.

    Args:
        vocab_size: Upper limit of the number of tokens.
        min_frequency: Pieces that occur less often are not merged.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    captions, counts = list(captions), Counter()
    untrained = _wordpiece({token: i for i, token in enumerate(special)}, lowercase)
    for caption in captions:
        counts.update(untrained.normalizer.normalize_str(caption))
    kept = sorted(counts, key=lambda c: (-counts[c], c))[:MAX_CHARACTERS]
    alphabet = sorted(c for c in kept if not c.isspace())
    # The trainer would number the "##" characters in the order of a hash map and break ties of frequency by these numbers,
    # so every run would give another vocabulary. Characters that are given as special tokens keep their order.
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
    """Return the tokenizer without the normalizers of `_cleaning`, which may be saved in its file."""
    state, cleaning = json.loads(backend.to_str()), json.loads(normalizers.Sequence(_cleaning()).__getstate__())
    steps, first = (state["normalizer"] or {}).get("normalizers", []), cleaning["normalizers"]
    if steps[: len(first)] != first:
        return backend
    state["normalizer"] = {"type": "Sequence", "normalizers": steps[len(first) :]}
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _cleaning() -> list[normalizers.Normalizer]:
    """Return `clean_caption`, without its limit of words, as normalizers of the tokenizers library."""
    spaces = [normalizers.Replace(mark, " ") for mark in "-/"]
    removed = normalizers.Replace(tokenizers.Regex(REMOVED), "")
    return [normalizers.Lowercase(), removed, *spaces, normalizers.Replace("<person>", "person")]


def clean_caption(text: str, max_words: int = 30) -> str:
    """Normalise a caption as ALBEF does.

    Lower case, without ``,.'!?"()*#:;~``, spaces for ``-`` and ``/``, at most ``max_words`` words. Conceptual Captions'
    ``<person>`` becomes "person".
    """
    text = re.sub(REMOVED, "", text.lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(text.split()[:max_words])
