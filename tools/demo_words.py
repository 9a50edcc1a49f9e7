"""The word lists of the demo corpus and the seeded source that draws from them.

Knows words and chance only: what a chat looks like is decided elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

T = TypeVar("T")


def split_words(text: str) -> list[str]:
    return text.split()


NAMES = split_words("""
    Ada Alan Alice Amir Anna Arthur Ben Bob Carla Carol Carlos Chloe Clara Daniel Dave David
    Diana Elena Eli Emil Emma Eva Felix Finn Frank Grace Hana Harry Helen Henry Hugo Ida Ines
    Iris Ivan Jack James Jane Jonas Joe John Julia Kai Karl Kate Lara Laura Leo Lena Lily Linus
    Liam Lucy Luis Maria Mark Marta Mary Max Maya Mia Mike Milo Mina Nina Nora Noah Olga Oliver
    Omar Oscar Otto Paul Peter Petra Philip Rosa Rita Robin Ruth Sam Sara Sofia Simon Stella
    Susan Tara Theo Thomas Tim Tina Tom Vera Victor Wanda Will Yara Yusuf Zoe
""")
# Never drawn in training: they show whether a name is copied or merely recalled.
HELD_OUT_NAMES = split_words("""
    Agnes Bruno Cora Dmitri Edith Farid Greta Hector Ingrid Jasper Kira Lorenz Mabel Nadia Orson
    Priya Quentin Ramona Sven Tilda Ulrich Viola Walter Xenia Yvonne
""")

CITIES = split_words("""
    Oslo Paris Rome Berlin Madrid Lisbon London Dublin Vienna Athens Cairo Tokyo Delhi Lima
    Prague Warsaw Helsinki Stockholm Bern Milan Boston Chicago Denver Toronto Sydney Seoul
    Bergen Porto Hamburg Geneva Nairobi Lagos Havana Quito Dallas Seattle Leeds York Naples
    Venice
""")
HELD_OUT_CITIES = split_words("Bristol Graz Malmo Tampere Lyon Kyoto Perth Austin Ghent Izmir")

COLOURS = split_words("""
    red blue green yellow orange purple pink brown black white grey silver gold turquoise violet
""")
ANIMALS = split_words("""
    dog cat rabbit hamster parrot horse turtle goldfish mouse pony snake canary lizard ferret
    duck
""")
FOODS = split_words("""
    pizza pasta soup rice curry salad bread cheese sushi pancakes noodles apples chocolate tacos
    potatoes
""")
JOBS = split_words("""
    baker teacher doctor nurse pilot farmer painter singer writer driver cook lawyer engineer
    gardener plumber
""")
ITEMS = split_words("""
    book lamp chair table bicycle phone camera guitar jacket hat cup umbrella backpack clock
    pillow kettle ladder mirror violin carpet
""")
ROOMS = split_words("kitchen bedroom bathroom garage hall office cellar garden")
LANGUAGES = split_words("French German Spanish Italian Dutch Polish Swedish Greek")
DAYS = split_words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

WORDS = split_words("""
    apple river stone cloud table window garden yellow silver forest mountain ocean bridge
    candle dragon engine feather guitar hammer island jacket kitten ladder mirror needle orange
    pencil queen rabbit saddle tiger umbrella valley winter zebra anchor basket castle desert
    eagle flower ginger harbor iron jungle king lemon market night owl paper quiet rocket shadow
    thunder uncle violin water yard arrow bottle camera doctor earth fire grass honey ice jewel
    knife lamp moon nest oven pearl road snow tree wheel wolf bread chair door egg fish glass
    hat ink key leaf milk nail onion pepper ring salt train vase wind book clock drum face goat
    house jar kite light map nose orbit pipe rain sand tower voice wall box coin dust field gate
    hill lake mouse net oak plate rope ship toy bell cup fan game hand line mask oil pen rose
    star team wave bird cake dish fork green blue red black white brown purple small large quick
    slow happy sad warm cold bright dark soft hard round sharp sweet bitter early late young old
    new strong weak brave calm clever
""")

_ONSETS = split_words("b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh st t tr v w x z")
_VOWELS = split_words("a e i o u ai ea io ou")
_CODAS = ["", "", "", "n", "r", "l", "s", "x", "th", "nd", "m", "k"]


@dataclass(frozen=True)
class Source:
    """Seeded chance; `held_out` adds the names and towns that training never draws."""

    rng: Random
    held_out: bool = False

    def pick(self, options: Sequence[T]) -> T:
        return self.rng.choice(options)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def made_up(self) -> str:
        syllables = self.rng.choice((1, 2, 2, 3))
        return "".join(
            self.pick(_ONSETS) + self.pick(_VOWELS) + self.pick(_CODAS) for _ in range(syllables)
        )

    def name(self) -> str:
        # Made-up names force the model to copy pieces of words instead of recalling whole ones.
        if self.chance(0.4):
            return self.made_up().capitalize()
        return self.pick(HELD_OUT_NAMES if self.held_out else NAMES)

    def city(self) -> str:
        if self.chance(0.25):
            return self.made_up().capitalize()
        return self.pick(HELD_OUT_CITIES if self.held_out else CITIES)

    def words(self, count: int) -> list[str]:
        made_up_rate = 0.0 if self.chance(0.75) else 0.5
        return [
            self.made_up() if self.chance(made_up_rate) else self.pick(WORDS) for _ in range(count)
        ]

    def sentence(self) -> str:
        return " ".join(self.words(self.rng.randint(2, 8))) + "."
