"""The official rules, on what they are known to do."""

import itertools
import random

import pytest

from vlp.data.vqa_answers import accuracy, normalise_answer, without_punctuation

KNOWN = {
    "Two": "2",
    "none": "0",
    "a  red\tcar\n": "red car",
    "The ten An apples": "10 apples",
    "don't": "don't",
    "dont": "don't",
    "couldnt've": "couldn't've",
    "couldn'tve": "couldn't've",
    "somebody'd": "somebodyd",
    "let's": "let's",
    "lets": "lets",
    "im": "im",  # the table has Im, which lower case never meets
    "black-and-white": "black and white",
    "black - and white": "black and white",
    "black- and-white": "black andwhite",  # a hyphen beside a space lets all of them vanish
    "1,000": "1000",
    "1,000 red/blue": "1000 redblue",  # and so does a number with a comma every sign
    "a,b": "b",  # a comma is a space, and "a" an article
    "u.s.a.": "usa",
    "3.5": "3.5",
    "no.": "no",
    "what?!": "what",
    "twas": "'twas",
    "y'alld've": "y'all'd've",
}


@pytest.mark.parametrize("answer", KNOWN)
def test_normalised_answer_equals_the_official_code(answer):
    assert normalise_answer(answer) == KNOWN[answer]


def test_more_than_32_periods_are_not_stripped():
    assert without_punctuation("." * 40) == "." * 8


def test_accuracy_is_the_mean_over_nine_of_ten():
    random.seed(0)
    for _ in range(50):
        said = random.choices(["yes", "no", "maybe"], k=10)
        slow = []
        for others in itertools.combinations(range(10), 9):
            slow.append(min(1, sum(said[n] == "yes" for n in others) / 3))
        assert accuracy("Yes.", said) == pytest.approx(sum(slow) / 10)
    assert accuracy("yes", ["yes"] * 3 + ["no"] * 7) == pytest.approx(0.9)
    assert accuracy("yes", ["yes"] * 4 + ["no"] * 6) == 1


def test_annotators_lose_punctuation_only_if_they_disagree():
    assert accuracy("two", ["two"] * 10) == 0  # 2 is no two
    assert accuracy("2", ["2."] * 10) == 0
    assert accuracy("2", ["2."] * 9 + ["no"]) == 1
    assert accuracy("2", ["2!"] * 9 + ["no"]) == 0  # the sign becomes a space, which nobody strips
