"""Question-only baseline for VQA: the most frequent answer to training questions with the same first words."""

from __future__ import annotations

from collections.abc import Sequence

from vlp.data.reading.annotated import AnnotatedReader, read_answers
from vlp.errors import BadSample

MAX_WORDS = 12  # of a question's beginning


class QuestionPrior:
    """Answer a question with the most frequent answer to the training questions that share the longest beginning with it.

    Args:
        readers: Annotations with answers. Of equally frequent answers the one that comes first in them is taken.

    Attributes:
        answers: All answers, the most frequent first.
    """

    def __init__(self, readers: Sequence[AnnotatedReader]):
        counts: dict[str, dict[str, float]] = {}  # beginning -> answer -> weight
        for reader in readers:
            source = reader.source
            for row in range(len(reader)):
                try:
                    record = reader.lines.record(row)
                    answers, _ = read_answers(record.get(source.answers))
                except BadSample:
                    continue
                for beginning in beginnings(str(record.get(source.text, ""))):
                    weights = counts.setdefault(beginning, {})
                    for answer, weight in answers:
                        weights[answer] = weights.get(answer, 0.0) + weight
        self.answers = sorted(counts.get("", {}), key=lambda answer: -counts[""][answer])
        self.best = {beginning: max(weights, key=weights.get) for beginning, weights in counts.items() if weights}

    def __call__(self, question: str) -> str:
        """Return the answer, empty if no training question has one."""
        return next((self.best[b] for b in reversed(beginnings(question)) if b in self.best), "")


def beginnings(question: str) -> list[str]:
    """Return the first 0, 1, 2, ... words of a question, in lower case."""
    words = question.lower().split()[:MAX_WORDS]
    return [" ".join(words[:count]) for count in range(len(words) + 1)]
