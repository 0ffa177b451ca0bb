"""The words that generated facts are made of, split into a training and a held-out part.

A fact is worth testing only if its answer cannot be guessed, so names are partly invented from
syllables and numbers are random. Every list is split by a checksum of the word: nine tenths serve
training, one tenth is kept for evaluation, the same tenth on every machine.
"""

# Lists of words read and change best as running text.
# ruff: noqa: SIM905

from __future__ import annotations

import random
import zlib
from typing import Literal

Split = Literal["train", "held_out"]

_NAMES = """Alice Arthur Agnes Albert Anna Basil Beatrice Bertram Bill Clara Conrad Cora Daniel Dora
Edgar Edith Edwin Eleanor Elias Eliza Emil Emma Ernest Esther Felix Flora Frank Fred Gerda Gilbert
Grace Greta Harold Hector Helen Henry Hilda Horace Hugo Ida Irene Isaac Ivan Jack Jane Jason Jeff
Joan John Josef Julia Julie Karl Kate Lara Laura Leo Leonard Lily Lionel Louis Lucy Luke Mabel
Magnus Margaret Mark Martha Martin Mary Matilda Max Miriam Mona Nancy Ned Nell Nina Nora Norman
Olga Oliver Oscar Otto Pamela Paul Peter Philip Quentin Ralph Rebecca Rosa Rupert Ruth Sam Sandra
Sarah Silas Simon Sophie Stella Stephen Susan Tess Theo Thomas Toby Ursula Vera Victor Viola Walter
Wanda Winnie""".split()
_CITIES = """Aberdeen Amsterdam Antwerp Athens Baltimore Basel Belfast Berlin Boston Bristol Cairo
Calais Chester Chicago Cologne Cork Dover Dresden Dublin Durham Exeter Florence Geneva Genoa Ghent
Glasgow Granada Hamburg Havana Hull Jersey Kiel Leeds Leipzig Lima Lisbon London Lyons Madrid Malta
Milan Moscow Munich Naples Norwich Oslo Oxford Padua Paris Perth Pisa Plymouth Prague Quebec Rome
Rouen Salem Seville Stockholm Tangier Toledo Toronto Trieste Troy Turin Utrecht Venice Verona Vienna
Warsaw York Zurich""".split()
_JOBS = """actor architect baker banker barber blacksmith bookseller bricklayer butcher carpenter
clerk coachman cobbler cook dentist diver doctor farmer ferryman fisherman gardener glazier hatter
hunter jeweller joiner judge lawyer librarian locksmith mason merchant miller miner nurse painter
pilot plumber poet porter potter printer sailor sculptor shepherd singer smith soldier surgeon
surveyor tailor tanner teacher thatcher watchmaker weaver""".split()
_ANIMALS = """ape badger bat bear beaver boar camel canary cat cobra cow crane crow deer dog donkey
duck eagle falcon ferret fox frog goat goose hare hawk hen heron horse lamb lion lizard magpie mole
monkey mouse newt otter owl ox parrot peacock pig pigeon pony rabbit rat raven robin salmon seal
sheep snail snake sparrow squirrel stork swan tiger toad tortoise turtle weasel wolf wren""".split()
_COLOURS = """amber black blue brown crimson gold green grey indigo ivory lilac orange pink purple
red scarlet silver violet white yellow""".split()
_FOODS = """apples bacon beans beef biscuits bread butter cabbage cake carrots cheese cherries
chicken chocolate cream currants dumplings eggs figs fish gingerbread grapes ham honey jam lemons
mushrooms mutton nuts olives onions oranges oysters pancakes peaches pears peas pie plums pork
porridge potatoes pudding raisins rice salad sausages soup strawberries toast turnips""".split()
_INSTRUMENTS = """accordion banjo bassoon bugle cello clarinet cornet cymbals drum fiddle flute
guitar harp horn lute lyre mandolin oboe organ piano piccolo pipe trombone trumpet tuba viola
violin zither""".split()
_THINGS = """anchor arrow axe bag barrel basket bell book bottle bowl box bracelet brooch broom
bucket candle cane cap card chain chest clock cloak coat coin compass cradle cross crown cup dagger
diary dish doll drum fan feather football glass glove goblet hammer hat helmet jar jewel jug kettle
key kite knife ladder lamp lantern letter locket map mask medal milk mirror needle net oar painting
parcel pearl pen pipe plate pot purse quilt ribbon ring rope rug saddle sceptre scroll seal shawl
shell shield shoe skull spade spear spoon statue sword ticket tile torch towel toy trumpet tub
umbrella urn vase violin watch wheel whistle wreath""".split()
_PLACES = """attic barn bathroom bedroom bridge cabin castle cave cellar chapel church cinema
cottage courtyard dairy den dungeon farm field forest fort fountain garage garden gate hall hallway
harbour hospital hotel inn island kitchen lake larder library lighthouse market meadow mill museum
office orchard palace park pier pond prison quarry quay school shed shop stable station store street
studio temple theatre tower tunnel valley vault village vineyard wharf workshop yard""".split()
_ADJECTIVES = """ancient bitter blue brave bright broken busy calm clever cold crooked dark dusty
early empty faint fancy fierce flat fresh gentle golden grand green grey happy heavy hidden hollow
humble icy iron jolly kind large lazy little lonely loud lucky mighty modest narrow noble odd old
pale plain proud quick quiet rapid red rough royal rusty secret sharp shiny silent silver simple
slow small smooth soft stiff strange strong sweet swift tall tame thin tiny warm wide wild windy
wooden yellow young""".split()
_ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh st t th tr v w z".split()
_VOWELS = "a e i o u ai ea ee ia io oo ou".split()
_CODAS = " l ld m n nd r rd rn s sk st t th x".split(" ")


def in_split(word: str, split: Split) -> bool:
    """Whether ``word`` belongs to ``split``; one word in ten is held out."""
    return (zlib.crc32(word.lower().encode()) % 10 == 0) == (split == "held_out")


class Vocabulary:
    """Draws words of each kind from one split.

    Args:
        rng: the only source of randomness.
        split: ``"train"`` or ``"held_out"``.
    """

    def __init__(self, rng: random.Random, split: Split = "train") -> None:
        self.rng = rng
        self.split: Split = split
        lists = {
            "name": _NAMES,
            "city": _CITIES,
            "job": _JOBS,
            "animal": _ANIMALS,
            "colour": _COLOURS,
            "food": _FOODS,
            "instrument": _INSTRUMENTS,
            "thing": _THINGS,
            "place": _PLACES,
            "adjective": _ADJECTIVES,
        }
        self._lists = {
            kind: [word for word in words if in_split(word, split)] for kind, words in lists.items()
        }

    def word(self, kind: str) -> str:
        """One word of a kind: name, city, job, animal, colour, food, instrument, thing, …"""
        return self.rng.choice(self._lists[kind])

    def words(self, kind: str, count: int) -> list[str]:
        """``count`` different words of a kind."""
        return self.rng.sample(self._lists[kind], count)

    def value(self, kind: str) -> str:
        """A word for the answer of a question.

        In training two in five are words of another kind or invented ones, so that a model learns
        to copy whatever stands there rather than to choose from a list.
        """
        drawn = self.rng.random()
        if self.split == "held_out" or drawn < 0.6:
            return self.word(kind)
        if drawn < 0.8:
            return self.word(self.rng.choice(sorted(self._lists))).lower()
        return self.invented_name().lower()

    def size(self, kind: str) -> int:
        """How many words of a kind there are."""
        return len(self._lists[kind])

    def invented_name(self) -> str:
        """A capitalised name of two or three random syllables."""
        while True:
            parts = [
                self.rng.choice(_ONSETS) + self.rng.choice(_VOWELS)
                for _ in range(self.rng.randint(1, 2))
            ]
            name = "".join(parts) + self.rng.choice(_ONSETS) + self.rng.choice("aeiou")
            name = (name + self.rng.choice(_CODAS)).capitalize()
            if in_split(name, self.split):
                return name

    def person(self) -> str:
        """A first name, an invented name, or both together."""
        kind = self.rng.random()
        if kind < 0.45:
            return self.word("name")
        if kind < 0.7:
            return self.invented_name()
        return f"{self.word('name')} {self.invented_name()}"

    def people(self, count: int) -> list[str]:
        """``count`` people, no two of whom share a word."""
        people: list[str] = []
        taken: set[str] = set()
        while len(people) < count:
            person = self.person()
            if taken.isdisjoint(person.split()):
                people.append(person)
                taken.update(person.split())
        return people

    def label(self) -> str:
        """Two words that name a thing: ``"rusty lantern"``."""
        return f"{self.word('adjective')} {self.word('thing')}"

    def digits(self, length: int) -> str:
        """A number of exactly ``length`` digits."""
        return str(self.rng.randint(10 ** (length - 1), 10**length - 1))
