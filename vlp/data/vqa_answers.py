"""VQA's official rules: normalisation of answers, and the accuracy of an answer against those of the annotators.

The rules follow Antol et al. 2015, sec. 3, and the evaluation code of the data set, including its mistakes, which are part
of every published number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
MOST_PERIODS = 32  # the official code passes re.UNICODE, which is 32, as the number of replacements
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(DIGITS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
# a word that lacks one of the apostrophes is read as the contraction
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
"""
APOSTROPHES = {
    whole[:at] + whole[at + 1 :]: whole
    for whole in CONTRACTIONS.split()
    for at, letter in enumerate(whole)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the official table has this one the wrong way round


def without_punctuation(answer: str) -> str:
    """Replace punctuation by spaces; remove a sign next to a space, or every sign if a number in the answer has a comma."""
    number = COMMA_IN_NUMBER.search(answer) is not None
    signs = {s: "" if number or f"{s} " in answer or f" {s}" in answer else " " for s in PUNCTUATION}
    return PERIOD.sub("", answer.translate(str.maketrans(signs)), count=MOST_PERIODS)


def normalise_answer(answer: str) -> str:
    """Return the answer in lower case, numbers as digits, without articles and punctuation, contractions with apostrophes."""
    words = without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    words = [number for word in words if (number := NUMBERS.get(word, word)) not in ARTICLES]
    return " ".join(APOSTROPHES.get(word, word) for word in words)


def accuracy(answer: str, annotators: Sequence[str]) -> float:
    """Compute the mean over annotators of min(1, matches among the other annotators / 3).

    Args:
        answer: Answer of the model, not normalised.
        annotators: Answer of each of two or more annotators; 10 in VQA v2.
    """
    answer = normalise_answer(answer)
    if len(set(annotators)) > 1:  # the official code removes punctuation only if the annotators disagree
        annotators = [without_punctuation(each) for each in annotators]
    matches = sum(each == answer for each in annotators)
    others = [matches - (each == answer) for each in annotators]
    return sum(min(1.0, n / 3) for n in others) / len(others)
