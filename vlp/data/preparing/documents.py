"""Long lists of a JSON document, of which one element is in memory at a time.

The document is read once from start to end, which finds the bounds of the elements and everything that is not JSON. From then
on each element is read where it is in the file, in any order.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from array import array
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from vlp.data.reading.tables import first_line, read_text
from vlp.errors import UserError
from vlp.files import open_regular

FIRST_READ = 1 << 16  # bytes
WHITE_SPACE = re.compile(r"[ \t\n\r]*")
decode = json.JSONDecoder().raw_decode


class Records:
    """Elements of a list of a JSON document. Each is read from the file when it is asked for.

    Args:
        path: The document.
    """

    def __init__(self, path: Path):
        self.path = path
        self._begins, self._sizes = array("q"), array("I")  # in bytes

    def append(self, begin: int, end: int) -> None:
        """Add the element at the bytes from ``begin`` to ``end``."""
        self._begins.append(begin)
        self._sizes.append(end - begin)

    @cached_property
    def _file(self) -> BinaryIO:
        return open_regular(self.path)

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, n: int) -> Any:
        if not 0 <= n < len(self):
            raise IndexError(n)
        return json.loads(os.pread(self._file.fileno(), self._sizes[n], self._begins[n]))


def read_document(path: Path) -> Records | dict[str, Records | None] | None:
    """Find the lists of a JSON document.

    Returns:
        The elements of a list; for an object its members, of which only lists are kept; None for another value.

    Raises:
        UserError: if the file cannot be read, is not UTF-8, or is not JSON.
    """
    first_line(path)  # refuses other encodings and compressed files
    try:
        with open_regular(path) as file:
            return _Scanner(path, file).document()
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno} is not JSON ({e.msg}); is the file complete?") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        read_text(path)  # raises UserError with the line and the probable encoding
        raise
    except (ValueError, RecursionError) as e:  # a number of too many digits, or too deep nesting
        raise UserError(f"{path} is not JSON that can be read ({e})") from None


class _Scanner:
    """Reader of a JSON document from start to end, which keeps the part from the current value on."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.is_ascii, self.is_end = "", 0, True, False
        self.line = 0  # line breaks before the text
        # position in the file in bytes, and the character of the text that is there
        self.position, self.position_at = 0, 0
        if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
            self.position = len(codecs.BOM_UTF8)
        file.seek(self.position)
        self.more()

    def more(self) -> None:
        """Read on, as much as is left unread at least, so that a long value is not decoded many times."""
        self.offset()
        self.line += self.text.count("\n", 0, self.at)
        data = self.file.read(max(FIRST_READ, len(self.text) - self.at))
        self.is_end = not data
        self.text, self.at = self.text[self.at :] + self.decoder.decode(data, final=self.is_end), 0
        self.position_at, self.is_ascii = 0, self.text.isascii()

    def offset(self) -> int:
        """Return the position in the file, in bytes."""
        passed = self.text[self.position_at : self.at]
        self.position += len(passed) if self.is_ascii else len(passed.encode())
        self.position_at = self.at
        return self.position

    def error(self, message: str, at: int) -> json.JSONDecodeError:
        error = json.JSONDecodeError(message, self.text, at)
        error.lineno += self.line
        return error

    def peek(self) -> str:
        """Skip white space and return the next character, "" at the end of the file."""
        while True:
            self.at = WHITE_SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or self.is_end:
                return self.text[self.at : self.at + 1]
            self.more()

    def take(self, character: str, message: str) -> None:
        """Move behind the character, which must come next."""
        if self.peek() != character:
            raise self.error(message, self.at)
        self.at += 1

    def value(self) -> Any:
        """Move behind the next value, and return it."""
        self.peek()
        while True:
            try:
                value, end = decode(self.text, self.at)
            except json.JSONDecodeError as e:
                # an error far from the end of what was read is not one of a value that continues there
                is_inside = e.pos < len(self.text) - 16 and not e.msg.startswith("Unterminated string")
                if self.is_end or is_inside:
                    raise self.error(e.msg, e.pos) from None
            else:
                if self.is_end or end < len(self.text) - 2:  # 1.5e of 1.5e7 is a number and two characters
                    self.at = end
                    return value
            self.more()

    def records(self) -> Records:
        """Move behind the list that comes next, and return its elements."""
        self.take("[", "Expecting value")
        records = Records(self.path)
        if self.peek() == "]":
            self.at += 1
            return records
        while True:
            self.peek()
            begin = self.offset()
            self.value()
            records.append(begin, self.offset())
            if self.peek() == "]":
                self.at += 1
                return records
            self.take(",", "Expecting ',' delimiter")

    def members(self) -> Iterator[str]:
        """Yield the names of the object that comes next. The caller moves behind the value of each."""
        self.take("{", "Expecting value")
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            if self.peek() != '"':
                raise self.error("Expecting property name enclosed in double quotes", self.at)
            name = self.value()
            self.take(":", "Expecting ':' delimiter")
            yield name
            if self.peek() == "}":
                self.at += 1
                return
            self.take(",", "Expecting ',' delimiter")

    def document(self) -> Records | dict[str, Records | None] | None:
        found: Records | dict[str, Records | None] | None = None
        if self.peek() == "[":
            found = self.records()
        elif self.peek() == "{":
            found = {}
            for name in self.members():
                found[name] = self.records() if self.peek() == "[" else None
                if found[name] is None:
                    self.value()
        else:
            self.value()
        if self.peek():
            raise self.error("Extra data", self.at)
        return found
