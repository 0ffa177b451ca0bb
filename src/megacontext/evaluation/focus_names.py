"""Names for many facts and stories in one history, none of which two of them share."""

# Lists of words read and change best as running text.
# ruff: noqa: SIM905

from __future__ import annotations

import random
from typing import NamedTuple

from megacontext.tasks.vocabulary import Vocabulary

# Things that can be carried about; none of them is among the words that training texts draw from.
OWN_THINGS = tuple(
    """acorn album almanac amulet anvil apron atlas bandage banner bead beaker belt bib binder
blanket blotter bonnet bookmark boot bridle briefcase brush buckle bulb bundle button cable cage
calendar camera candlestick canteen carafe carton cartridge cauldron chalk chart chisel cigar clamp
clasp clip cloth club cobweb collar comb cork corkscrew crate crayon crowbar crutch crystal cube
cuff cushion decanter deed doormat drill duster dustpan dynamo earring easel envelope eraser flag
flagon flannel flare flask flint folder fork fossil frame funnel gauge gavel gear globe gong grater
guidebook hairpin halter hamper handbag handkerchief handle hanger harness harpoon hatchet headband
hinge hoe holster hook hoop horseshoe hose hourglass icon idol inkwell invoice jacket javelin jersey
jigsaw journal jumper kerchief kilt knapsack knob ladle lance lasso leaflet leash lens lever lid
lighter lock log magnet magazine mallet manual manuscript marble marker mat mattress medallion menu
microscope mitten mop muffler nail napkin necklace necktie newspaper nib nightcap notebook nozzle
nugget ointment opal ornament padlock paintbrush pamphlet pan parachute parasol parchment passport
patch peg pendant pendulum pennant penny pestle petal photograph pick pillow pin pistol pitcher
pitchfork placard plank plaster plough plug poker pole postcard poster pouch powder prism propeller
pulley pump puppet puzzle quill quiver raft rake rattle razor receipt record reel rein rifle rivet
rocket rod roller rosette rucksack rudder ruler sabre sachet sandal sapphire sash satchel saucepan
saucer saw scabbard scale scarf screw screwdriver scythe seed shackle sheet shovel shutter sickle
sieve signet skate slate sled sleigh slipper snuffbox soap sock spanner spatula spindle splint
sponge spool stamp staple stencil stick stirrup stocking stool strap straw string suitcase sundial
sweater syringe tablecloth tablet tankard tapestry tarpaulin teacup teapot telescope tent
thermometer thimble thread tiara tinderbox toothbrush trap tray trident trinket tripod trolley
trophy trowel trunk tube turban typewriter vest vial visor waistcoat wallet wand washbasin
wheelbarrow whip whisk wick wig winch wrench yardstick yoke""".split()
)
# Of the few two-word labels there are, how many are drawn before other names are taken.
_LABEL_TRIES = 60


class Given(NamedTuple):
    """Labels and things that were given out so far."""

    labels: frozenset[str]
    things: tuple[str, ...]


class OwnNames(Vocabulary):
    """Held-out words, of which those that tell two subjects apart are given out once only.

    People have invented names. What stories carry about comes from :data:`OWN_THINGS`, and has an
    invented name once all of these are given out.

    Args:
        rng: the only source of randomness.
    """

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng, "held_out")
        self._names: set[str] = set()
        self._labels: set[str] = set()
        self._things = rng.sample(OWN_THINGS, len(OWN_THINGS))

    @property
    def given(self) -> Given:
        """What was given out so far, for :meth:`return_to`."""
        return Given(frozenset(self._labels), tuple(self._things))

    def return_to(self, given: Given) -> None:
        """Takes back labels and things that were given out since and are not used."""
        self._labels, self._things = set(given.labels), list(given.things)

    def invented_name(self) -> str:
        """A capitalised name of two or three random syllables."""
        while True:
            name = super().invented_name()
            if name not in self._names:
                self._names.add(name)
                return name

    def person(self) -> str:
        """An invented name."""
        return self.invented_name()

    def people(self, count: int) -> list[str]:
        """``count`` people."""
        return [self.person() for _ in range(count)]

    def label(self) -> str:
        """``"broken jar"``, or ``"jar of Zatrax"`` where hardly any of these are left."""
        for _ in range(_LABEL_TRIES):
            label = super().label()
            if label not in self._labels:
                self._labels.add(label)
                return label
        return f"{self.word('thing')} of {self.invented_name()}"

    def words(self, kind: str, count: int) -> list[str]:
        """``count`` different words of a kind; things are those of stories."""
        if kind != "thing":
            return super().words(kind, count)
        return [self.thing() for _ in range(count)]

    def thing(self) -> str:
        """Something that people in a story carry about."""
        return self._things.pop() if self._things else self.invented_name().lower()
