"""What can be answered without a look at the picture: the baseline that a number on VQA is to be read beside."""

from __future__ import annotations

from collections.abc import Sequence

from vlp.data.reading.annotated import Annotated, read_answers
from vlp.errors import BadSample

WORDS = 12  # of a question's beginning


class QuestionPrior:
    """The answer that is most frequent among the training questions which begin as the question does, as far as one does.

    Args:
        trained: annotations with answers; of equal counts the answer that was met first wins.

    Attributes:
        answers: all of them, the most frequent first.
    """

    def __init__(self, trained: Sequence[Annotated]):
        counts: dict[str, dict[str, float]] = {}
        for source in trained:
            reader = source.open()
            for row in range(len(reader)):
                try:
                    record = reader.lines.record(row)
                    answers, _ = read_answers(record.get(source.answers))
                except BadSample:
                    continue
                for beginning in beginnings(str(record.get(source.text, ""))):
                    of = counts.setdefault(beginning, {})
                    for answer, weight in answers:
                        of[answer] = of.get(answer, 0.0) + weight
        self.answers = sorted(counts.get("", {}), key=lambda answer: -counts[""][answer])
        self.best = {beginning: max(of, key=of.get) for beginning, of in counts.items() if of}

    def __call__(self, question: str) -> str:
        """The answer; empty where there was nothing to learn from."""
        return next((self.best[b] for b in reversed(beginnings(question)) if b in self.best), "")


def beginnings(question: str) -> list[str]:
    """None, one, two, ... of its words."""
    words = question.lower().split()[:WORDS]
    return [" ".join(words[:count]) for count in range(len(words) + 1)]
