"""Facts whose questions share no content word with them: both name the same thing differently."""

# Lists of words read and change best as running text.
# ruff: noqa: SIM905

from __future__ import annotations

import random
from collections.abc import Sequence

from megacontext.tasks.documents import Question, Theme
from megacontext.tasks.vocabulary import Split, Vocabulary, in_split

# Pairs ``this/that`` of words that mean the same.
_ADJECTIVES = """ancient/aged angry/furious big/large bold/daring bright/shining broken/cracked
careful/cautious clever/smart cold/chilly crazy/mad cruel/brutal damp/wet dirty/filthy drowsy/sleepy
empty/vacant evil/wicked famous/renowned fast/quick fat/stout foolish/silly foreign/alien
frightened/scared gentle/mild glad/happy handsome/beautiful hidden/secret honest/truthful
hungry/starving idle/lazy lonely/solitary loyal/faithful lucky/fortunate modern/new odd/strange
pale/white poor/penniless proud/haughty quiet/silent rich/wealthy sad/unhappy sick/ill
sincere/earnest slender/thin small/little soft/tender stubborn/obstinate sturdy/strong tired/weary
ugly/hideous vast/huge worn/shabby""".split()
_PEOPLE = """bandit/robber beggar/pauper boy/lad buccaneer/pirate chef/cook chieftain/leader
child/youngster clergyman/parson doctor/physician druggist/chemist emperor/monarch enemy/foe
envoy/messenger farmer/ploughman fiddler/violinist forester/woodman friend/comrade girl/lass
guard/sentry guest/visitor infant/baby innkeeper/landlord jester/clown lady/gentlewoman
lawyer/attorney minstrel/singer orator/speaker pilgrim/wanderer pupil/scholar relative/kinsman
sailor/mariner servant/footman seamstress/dressmaker soldier/warrior spouse/wife thief/burglar
tutor/teacher witch/sorceress wizard/magician writer/author""".split()
_OBJECTS = """attire/clothing blade/sword boat/vessel bucket/pail carriage/coach casket/chest
cellar/basement cottage/hut couch/sofa cup/mug dagger/knife estate/manor forest/wood garret/attic
gem/jewel gift/present harbour/port hill/mound jail/prison lamp/lantern letter/epistle marsh/swamp
meadow/pasture painting/picture parcel/package path/trail pond/pool road/highway robe/gown rope/cord
sack/bag shop/store stone/rock stove/oven stream/brook summit/peak tavern/inn volume/book
window/casement yard/court""".split()

# Kind of value; what is said; what is asked, in other words.
_PERSON_RELATIONS = (
    ("city", ("The {k} was born in {v}.", "The {k} grew up in {v}."),
     ("What is the native town of the {k}?", "Which place does the {k} come from?")),
    ("food", ("The {k} dines on {v}.", "The {k} cannot do without {v}."),
     ("What does the {k} like to eat?", "Which dish is dearest to the {k}?")),
    ("animal", ("The {k} goes about with a tame {v}.", "The {k} has trained a {v}."),
     ("Which beast belongs to the {k}?", "What creature does the {k} keep?")),
    ("instrument", ("The {k} practises the {v} all day.", "The {k} makes music on the {v}."),
     ("What does the {k} play?", "Which instrument is that of the {k}?")),
    ("colour", ("The {k} wears a {v} hat.", "The {k} owns a {v} cloak."),
     ("In which shade does the {k} dress?", "What tint do the clothes of the {k} have?")),
)  # fmt: skip
_NUMBER_RELATIONS = (
    ("digits", ("The {k} is marked {v}.", "Somebody counted {v} for the {k}.",
                "The {k} bears the number {v}."),
     ("Which figure is that of the {k}?", "What digits go with the {k}?")),
)  # fmt: skip


class SynonymThemes:
    """Draws facts about things that a question calls by other names.

    The pairs of synonyms are the same in both splits, since which words mean the same has to be
    known; what is held out are their combinations, so that no subject of one split occurs in the
    other.

    Args:
        rng: the only source of randomness.
        split: which combinations, and which part of the vocabulary for values.
    """

    def __init__(self, rng: random.Random, split: Split = "train") -> None:
        self.rng = rng
        self.split: Split = split
        self.vocabulary = Vocabulary(rng, split)

    def theme(self, count: int) -> Theme:
        """``count`` facts; question ``i`` is about statement ``i`` and shares no content word."""
        theme = Theme([])
        taken: set[str] = set()
        for index in range(count):
            person = self.rng.random() < 0.6
            adjective, noun = self._subject(_PEOPLE if person else _OBJECTS, taken)
            relations = _NUMBER_RELATIONS
            if person and self.rng.random() < 0.7:
                relations = _PERSON_RELATIONS
            kind, says, asks = self.rng.choice(relations)
            value = self._value(kind)
            told, asked = (0, 1) if self.rng.random() < 0.5 else (1, 0)
            names = [f"{adjective[i]} {noun[i]}" for i in (told, asked)]
            statement = self.rng.choice(says)
            question = self.rng.choice(asks).format(k=names[1])
            # Colours are adjectives, too.
            while value in question.removesuffix("?").split():
                value = self._value(kind)
            theme.statements.append(statement.format(k=names[0], v=value))
            theme.questions.append(Question(question, value, index + 1, "synonym"))
        return theme

    def _value(self, kind: str) -> str:
        return self.vocabulary.digits(5) if kind == "digits" else self.vocabulary.value(kind)

    def _subject(
        self, nouns: Sequence[str], taken: set[str]
    ) -> tuple[Sequence[str], Sequence[str]]:
        """An adjective and a noun, two words each, that were not taken together before."""
        while True:
            adjective, noun = self.rng.choice(_ADJECTIVES), self.rng.choice(nouns)
            subject = f"{adjective} {noun}"
            if in_split(subject, self.split) and subject not in taken:
                taken.add(subject)
                return adjective.split("/"), noun.split("/")
