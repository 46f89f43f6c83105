"""The language of the demo: the same everywhere, made of its words, and with the least loss that its odds give."""

from __future__ import annotations

import hashlib
import itertools
import math

import pytest

from grouped_gemm.cli import language


def words_of(text: bytes) -> list[bytes]:
    """The whole words of a text, without the last one if its space is missing."""
    return [word + b" " for word in text.split(b" ")[:-1]]


def rows(texts: language.Texts) -> list[bytes]:
    return [bytes(row.tolist()) for row in texts.data]


def test_the_language_is_the_same_on_every_machine():
    letters, _, choices, _ = language._language()
    digest = hashlib.sha256(repr((letters.tolist(), choices.tolist())).encode()).hexdigest()
    assert digest == "b4186406ecde8f39c2bea604a43fc6d980858cd0e3a79714f72d7efa0819cdaf"


def test_words_are_spelled_differently():
    letters, sizes, _, _ = language._language()
    words = {bytes(row[:size].tolist()) for row, size in zip(letters, sizes)}
    assert len(words) == language._WORDS
    assert all(word.endswith(b" ") and word.count(b" ") == 1 for word in words)


def test_texts_repeat_with_their_seed_only():
    first, again, other = (language.write(3, 100, seed).data for seed in (1, 1, 2))
    assert first.shape == (3, 100) and first.equal(again) and not first.equal(other)


def test_texts_are_written_in_parts(monkeypatch):
    monkeypatch.setattr(language, "_AT_ONCE", 2)
    assert len(set(rows(language.write(5, 60, 0)))) == 5


@pytest.mark.parametrize("subject", [0.0, 1.0])
def test_a_word_follows_another_that_allows_it_or_is_the_subject(monkeypatch, subject):
    monkeypatch.setattr(language, "_SUBJECT", subject)
    letters, sizes, choices, _ = language._language()
    names = [bytes(row[:size].tolist()) for row, size in zip(letters, sizes)]
    for text in rows(language.write(20, 200, 0)):
        words = [names.index(word) for word in words_of(text)]
        assert len(words) > 5
        if subject:
            assert len(set(words[1:])) == 1
        else:
            assert all(word in choices[before] for before, word in itertools.pairwise(words))


def test_the_least_loss_is_that_of_the_odds(monkeypatch):
    monkeypatch.setattr(language, "_SUBJECT", 0.0)  # a text does not say what its subject is
    letters, sizes, choices, odds = language._language()
    names = [bytes(row[:size].tolist()) for row, size in zip(letters, sizes)]
    texts = language.write(20, 200, 0)
    surprise = 0.0
    for text in rows(texts):
        words = [names.index(word) for word in words_of(text)]
        for before, word in itertools.pairwise(words):
            surprise -= math.log(sum(p for choice, p in zip(choices[before].tolist(), odds.tolist()) if choice == word))
    assert texts.least_loss == pytest.approx(surprise / (20 * 199))
