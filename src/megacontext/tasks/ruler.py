"""RULER (arXiv 2404.06654): its retrieval, tracing and aggregation tasks, generated as text.

Every task keeps its published definition and numbers. What differs from the published generator:

* The noise is whatever text the statements are put into, not essays or a repeated sentence.
* Keys and words come from the package's vocabulary: names are partly invented from syllables.
* The instruction before the text is left out, since a stream of text has none; the question alone
  asks. Few-shot examples are left out, too.

``wording="ruler"`` keeps the published needles and questions, with the answer's beginning left to
the model. ``wording="plain"`` says the same in sentences that the bundled model was trained on
(:class:`~.fact_themes.FactThemes`), with these differences: keys are two plain words, a variable is
asked for its value rather than a value for its variables (which follows the same chain from its
end), and assignments end with a full stop. Asking for several keys at once, and counting words, are
in no training text whatever the wording.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megacontext.errors import InputError
from megacontext.tasks.vocabulary import Split, Vocabulary

Wording = Literal["ruler", "plain"]


@dataclass(frozen=True)
class _Words:
    """How needles and questions read; a key stands where ``{key}`` is, several are joined."""

    needle: str
    one: str
    several: str
    key_prefix: str
    assignment: str
    tracing: str
    common: str
    frequent: str


_WORDINGS: dict[Wording, _Words] = {
    "ruler": _Words(
        needle="One of the special magic numbers for {key} is: {value}.",
        one="What is the special magic number for {key} mentioned in the provided text?",
        several="What are all the special magic numbers for {key} mentioned in the provided text?",
        key_prefix="",
        assignment="VAR {name} = {source}",
        tracing="Find all variables that are assigned the value {value} in the text above.",
        common="What are the {count} most common words in the above list?",
        frequent="Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text?",
    ),
    "plain": _Words(
        needle="The secret code of the {key} is {value}.",
        one="What is the secret code of the {key}?",
        several="What are all the codes of the {key}?",
        key_prefix="the ",
        assignment="VAR {name} = {source}.",
        tracing="What is the value of VAR {name}?",
        common="Which {count} words come most often in the list?",
        frequent="Which three words come most often in the text, apart from the dots?",
    ),
}
_NAME_LETTERS: dict[Wording, int] = {"ruler": 5, "plain": 3}
_NOISE_WORD = "..."


@dataclass(frozen=True)
class RulerText:
    """One question of RULER with the text that answers it.

    Attributes:
        statements: sentences to put into noise, in this order; none where ``context`` is all.
        context: the whole text of a task that stands in no noise; empty otherwise.
        question: the question.
        answers: every one of them is expected.
        evidence: the statements that the answer needs, by index.
    """

    statements: tuple[str, ...]
    context: str
    question: str
    answers: tuple[str, ...]
    evidence: tuple[int, ...]


class RulerTasks:
    """Draws questions of RULER.

    Args:
        rng: the only source of randomness.
        wording: the published one, or the one that the bundled model knows.
        split: which part of the vocabulary keys and words come from.
    """

    def __init__(
        self, rng: random.Random, wording: Wording = "ruler", split: Split = "held_out"
    ) -> None:
        self.rng = rng
        self.wording: Wording = wording
        self.vocabulary = Vocabulary(rng, split)
        self._words = _WORDINGS[wording]

    def needles(
        self, *, keys: int = 1, values: int = 1, queries: int = 1, digits: int = 7
    ) -> RulerText:
        """Needles in a haystack: numbers that belong to keys, in random order.

        Published: ``niah_single`` has one key; ``niah_multikey`` four, of which one is asked;
        ``niah_multivalue`` one with four values, all asked; ``niah_multiquery`` four, all asked.

        Args:
            keys: how many there are.
            values: numbers for each key.
            queries: how many keys the question asks for.
            digits: of every number.

        Raises:
            InputError: more keys are asked for than there are, or the numbers are too short to
                differ.
        """
        if not 1 <= queries <= keys:
            raise InputError(f"{queries} of {keys} keys are asked for; ask for 1 to {keys}")
        names = self._keys(keys)
        numbers = self._numbers(keys * values, digits)
        pairs = [(names[index // values], number) for index, number in enumerate(numbers)]
        self.rng.shuffle(pairs)
        asked = self.rng.sample(names, queries)
        evidence = tuple(index for index, (name, _) in enumerate(pairs) if name in asked)
        question = self._words.one if queries * values == 1 else self._words.several
        return RulerText(
            statements=tuple(self._words.needle.format(key=k, value=v) for k, v in pairs),
            context="",
            question=question.format(key=_listed(asked, self._words.key_prefix)),
            answers=tuple(pairs[index][1] for index in evidence),
            evidence=evidence,
        )

    def variable_tracking(self, *, chains: int = 1, hops: int = 4) -> RulerText:
        """Variable tracking: a number handed on over ``hops`` assignments in each chain.

        The chains are mixed, each in its order; one of them is asked.
        """
        per_chain = hops + 1
        names = self._names(chains * per_chain)
        values = self._numbers(chains, 5)
        turns = [chain for chain in range(chains) for _ in range(per_chain)]
        self.rng.shuffle(turns)
        said = [0] * chains
        statements: list[str] = []
        for chain in turns:
            name = names[chain * per_chain + said[chain]]
            before = names[chain * per_chain + said[chain] - 1]
            source = f"VAR {before}" if said[chain] else values[chain]
            statements.append(self._words.assignment.format(name=name, source=source))
            said[chain] += 1
        chain_names = tuple(names[:per_chain])
        question = self._words.tracing.format(value=values[0], name=chain_names[-1])
        return RulerText(
            statements=tuple(statements),
            context="",
            question=question,
            answers=chain_names if self.wording == "ruler" else (values[0],),
            evidence=tuple(index for index, chain in enumerate(turns) if chain == 0),
        )

    def common_words(
        self, words: int, *, common: int = 10, repeats: int = 30, other_repeats: int = 3
    ) -> RulerText:
        """Common words extraction: a numbered list in which some words stand more often.

        Published: ten words thirty times each, all others three times; six times and once where
        the text has fewer than 4,096 tokens.

        Args:
            words: different words in the list.
            common: how many of them are common.
            repeats: of each common word.
            other_repeats: of every other word.

        Raises:
            InputError: there are not more words than common ones, or these are not commoner.
        """
        if not (words > common and repeats > other_repeats >= 1):
            raise InputError(
                f"{words} words of which {common} stand {repeats} times and the others "
                f"{other_repeats} times leave nothing to ask; raise `words` or `repeats`"
            )
        drawn: dict[str, None] = {}
        while len(drawn) < words:
            drawn[self.vocabulary.invented_name().lower()] = None
        chosen = list(drawn)
        listed = chosen[:common] * repeats + chosen[common:] * other_repeats
        self.rng.shuffle(listed)
        return RulerText(
            statements=(),
            context=" ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1)),
            question=self._words.common.format(count=common),
            answers=tuple(chosen[:common]),
            evidence=(),
        )

    def frequent_words(
        self, words: int, *, alpha: float = 2.0, vocabulary: int = 2000, letters: int = 6
    ) -> RulerText:
        """Frequent words extraction: coded words whose frequencies follow a zeta distribution.

        The word of rank ``k`` stands ``words * k**-alpha / zeta(alpha)`` times, rounded down. The
        first rank is noise (``...``); the next three are asked.

        Raises:
            InputError: so few words that the fourth and fifth rank stand equally often.
        """
        codes: dict[str, None] = {}
        while len(codes) < vocabulary:
            codes["".join(self.rng.choices(string.ascii_lowercase, k=letters))] = None
        ranked = [_NOISE_WORD, *list(codes)[1:]]
        zeta = float(torch.special.zeta(torch.tensor(alpha, dtype=torch.float64), 1.0))
        counts = [int(words * rank**-alpha / zeta) for rank in range(1, vocabulary + 1)]
        if not counts[3] > counts[4]:
            raise InputError(f"{words} words are too few to tell their frequencies; take more")
        text = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
        self.rng.shuffle(text)
        return RulerText(
            statements=(),
            context=" ".join(text),
            question=self._words.frequent,
            answers=tuple(ranked[1:4]),
            evidence=(),
        )

    def _keys(self, count: int) -> list[str]:
        """Different keys: an adjective and a thing, or an invented name for many keys."""
        draw = self.vocabulary.word
        pairs = self.vocabulary.size("adjective") * self.vocabulary.size("thing")
        keys: dict[str, None] = {}
        while len(keys) < count:
            adjective, thing = draw("adjective"), draw("thing")
            if self.wording == "ruler":
                noun = thing if 2 * count <= pairs else self.vocabulary.invented_name().lower()
                keys[f"{adjective}-{noun}"] = None
            elif 2 * count <= pairs:
                keys[f"{adjective} {thing}"] = None
            else:
                keys[f"{thing} of {self.vocabulary.invented_name()}"] = None
        return list(keys)

    def _numbers(self, count: int, digits: int) -> list[str]:
        """Different numbers of equal length."""
        low, high = 10 ** (digits - 1), 10**digits
        if count > high - low:
            raise InputError(f"there are not {count} numbers of {digits} digits; raise `digits`")
        return [str(number) for number in self.rng.sample(range(low, high), count)]

    def _names(self, count: int) -> list[str]:
        """Different names of variables, in capital letters."""
        names: dict[str, None] = {}
        while len(names) < count:
            letters = self.rng.choices(string.ascii_uppercase, k=_NAME_LETTERS[self.wording])
            names["".join(letters)] = None
        return list(names)


def _listed(keys: Sequence[str], prefix: str) -> str:
    """Keys as a question names them, after one ``prefix`` that its template has already."""
    if len(keys) == 1:
        return keys[0]
    *others, last = keys
    return f", {prefix}".join(others) + f", and {prefix}{last}"
