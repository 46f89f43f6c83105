"""Text in a made-up language, for the demo: the same on every machine, without a network, and as much as a run needs.

The language has `_WORDS` words. After each one `_CHOICES` words are possible, and after each syllable of a word
`_SYLLABLES` syllables, some far more often than others. At times a text comes back to its subject, one word that was
drawn for it. So there is something to learn at every scale: letters, spelling, which of 131,072 pairs of words are
likely, and what the text is about. Common facts are learned first and rare ones late, as in a real language: the loss
falls quickly at first, and still falls after thousands of steps. No text is used twice, so the loss of a training step
is the loss on unseen text.

Real text that every machine has, such as the source of Python's standard library, differs between versions of Python,
and a long run reads all of it several times, so its training loss would be that of text it has seen.

V: words of the language. N, W: texts, words of a text. L: letters of the longest word with its space. S: bytes of a
text. C: choices.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_WORDS = 4096
_CHOICES = 32  # words that may follow a word
_SYLLABLES = 8  # syllables that may follow a syllable
_SUBJECT = 1 / 8  # how often the next word is the subject of the text
_AT_ONCE = 4096  # texts that are written at the same time


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts of equal length.

    Attributes:
        data: (N, S) uint8. Each text begins with a word, and ends within one.
        least_loss: nats per byte, without the first byte of a text: no model can be better on average, even if it knew
            the language and the subject of each text.
    """

    data: Tensor
    least_loss: float

    @property
    def unigram_loss(self) -> float:
        """The lowest loss of a model that knows how frequent each byte is, but sees no context, in nats per byte."""
        return torch.special.entr(self.data.flatten().bincount() / self.data.numel()).sum().item()


def write(num_texts: int, length: int, seed: int) -> Texts:
    """Writes texts (N, S) on the CPU, in a second several thousand texts of 256 bytes.

    The same ``seed`` gives the same texts, as far as torch's generator for the CPU gives the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(_AT_ONCE, num_texts - start) for start in range(0, num_texts, _AT_ONCE)]
    parts = [_write(size, length, generator) for size in sizes]
    surprise = sum(surprise for _, surprise in parts)
    return Texts(torch.cat([data for data, _ in parts]), surprise / (num_texts * (length - 1)))


def _write(num_texts: int, length: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Texts (N, S), and the sum of -log p(word | previous word, subject) over their whole words but the first ones."""
    letters_VL, sizes_V, choices_VC, odds_C = _language()

    subject_N, first_N = torch.randint(_WORDS, (2, num_texts), generator=generator)
    words = [first_N]
    log_p = [torch.zeros(num_texts, dtype=torch.float64)]
    written_N = sizes_V[first_N]
    while written_N.min() < length:
        choice_N = torch.multinomial(odds_C, num_texts, replacement=True, generator=generator)
        is_subject_N = torch.rand(num_texts, generator=generator) < _SUBJECT
        possible_NC = choices_VC[words[-1]]
        word_N = torch.where(is_subject_N, subject_N, possible_NC.gather(1, choice_N[:, None])[:, 0])
        by_choice_N = ((possible_NC == word_N[:, None]) * odds_C).sum(1)  # two choices may be the same word
        log_p.append(((1 - _SUBJECT) * by_choice_N + _SUBJECT * (word_N == subject_N)).log())
        words.append(word_N)
        written_N = written_N + sizes_V[word_N]
    words_NW, log_p_NW = torch.stack(words, 1), torch.stack(log_p, 1)
    sizes_NW = sizes_V[words_NW]
    is_whole_NW = sizes_NW.cumsum(1) <= length
    is_letter_NWL = torch.arange(letters_VL.shape[1]) < sizes_NW[:, :, None]
    place_NB = is_letter_NWL.flatten(1).cumsum(1) - 1
    place_NB = place_NB.masked_fill(~is_letter_NWL.flatten(1), length).clamp(max=length)  # the last column is dropped
    data = torch.zeros(num_texts, length + 1, dtype=torch.uint8)
    data.scatter_(1, place_NB, letters_VL[words_NW].flatten(1))
    return data[:, :length].contiguous(), -(log_p_NW * is_whole_NW).sum().item()


@functools.cache
def _language() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Letters of each word (V, L) uint8, its size with the space (V,), the words after it (V, C), and their odds (C,).

    Python guarantees that `random.Random.random` gives the same numbers in every version.
    """
    draw = random.Random(0).random

    def zipf(size: int, offset: int) -> Callable[[], int]:
        """Draws one of ``size`` ranks with a frequency of 1 / (rank + offset)."""
        total = list(itertools.accumulate(1 / (rank + offset) for rank in range(size)))
        return lambda: bisect.bisect(total, draw() * total[-1])

    # After a syllable, some others are likely.
    syllables = [a + b for a, b in itertools.product("bcdfghjklmnprstvwz", "aeiou")]
    first, next_, word = zipf(len(syllables), 1), zipf(_SYLLABLES, 1), zipf(_WORDS, 2)
    syllables.sort(key=lambda _: draw())
    follow = [[first() for _ in range(_SYLLABLES)] for _ in syllables]
    words: dict[str, None] = {}
    while len(words) < _WORDS:
        chain = [first()]
        for _ in range(int(draw() * (1 + len(words).bit_length() // 2))):  # frequent words are short
            chain.append(follow[chain[-1]][next_()])
        words["".join(syllables[i] for i in chain) + " "] = None
    spelled = [word.encode() for word in words]
    longest_word = max(map(len, spelled))
    letters = torch.tensor([list(word.ljust(longest_word)) for word in spelled], dtype=torch.uint8)
    sizes = torch.tensor([len(word) for word in spelled])
    choices = torch.tensor([[word() for _ in range(_CHOICES)] for _ in range(_WORDS)])
    odds = 1 / torch.arange(1, _CHOICES + 1, dtype=torch.float64)
    return letters, sizes, choices, odds / odds.sum()
