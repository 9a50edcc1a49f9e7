"""The table of facts the demo model knows, and the phrasings in which it is asked."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FactKind:
    """Questions take {k}, answers take {k} and {v}; a leading {k} is capitalised by the caller."""

    questions: tuple[str, ...]
    answer: str
    table: dict[str, str]


def _table(text: str) -> dict[str, str]:
    return dict(pair.strip().split("=") for pair in text.replace("\n", " ").split(","))


_CAPITALS = _table("""France=Paris,Italy=Rome,Germany=Berlin,Spain=Madrid,Portugal=Lisbon,
England=London,Ireland=Dublin,Austria=Vienna,Greece=Athens,Egypt=Cairo,Japan=Tokyo,Norway=Oslo,
Sweden=Stockholm,Finland=Helsinki,Denmark=Copenhagen,Poland=Warsaw,Hungary=Budapest,Peru=Lima,
Cuba=Havana,Kenya=Nairobi,Canada=Ottawa,China=Beijing,India=Delhi,Russia=Moscow,Turkey=Ankara,
Belgium=Brussels,Chile=Santiago,Iceland=Reykjavik,Switzerland=Bern,Australia=Canberra""")
_SYMBOLS = _table("""gold=Au,silver=Ag,iron=Fe,copper=Cu,oxygen=O,hydrogen=H,carbon=C,nitrogen=N,
helium=He,sodium=Na,potassium=K,lead=Pb,tin=Sn,mercury=Hg,zinc=Zn,neon=Ne""")
_OPPOSITES = _table("""hot=cold,big=small,fast=slow,up=down,left=right,day=night,happy=sad,
young=old,hard=soft,light=dark,open=closed,full=empty,early=late,rich=poor,strong=weak,wet=dry,
loud=quiet,high=low,near=far,sweet=bitter,clean=dirty,thick=thin,deep=shallow,true=false""")

FACTS: dict[str, FactKind] = {
    "capital": FactKind(
        (
            "What is the capital of {k}?",
            "Tell me the capital of {k}.",
            "Which city is the capital of {k}?",
            "Name the capital of {k}.",
            "What's the capital city of {k}?",
            "Do you know the capital of {k}?",
        ),
        "The capital of {k} is {v}.",
        _CAPITALS,
    ),
    "country": FactKind(
        ("Which country has the capital {k}?", "{k} is the capital of which country?"),
        "{k} is the capital of {v}.",
        {city: country for country, city in _CAPITALS.items()},
    ),
    "colour": FactKind(
        (
            "What colour is {k}?",
            "Which colour is {k}?",
            "What color is {k}?",
            "Tell me the colour of {k}.",
        ),
        "{k} is {v}.",
        _table("""grass=green,snow=white,coal=black,blood=red,the sky=blue,the sun=yellow,
a banana=yellow,a tomato=red,a carrot=orange,chocolate=brown,a lemon=yellow,a frog=green,
an elephant=grey,a flamingo=pink,milk=white,the sea=blue,a strawberry=red,a crow=black"""),
    ),
    "sound": FactKind(
        ("What does {k} say?", "What sound does {k} make?", "Which sound does {k} make?"),
        "{k} says {v}.",
        _table("""a cow=moo,a dog=woof,a cat=meow,a duck=quack,a sheep=baa,a pig=oink,a horse=neigh,
a lion=roar,a bee=buzz,a frog=croak,an owl=hoot,a mouse=squeak,a snake=hiss,
a rooster=cock-a-doodle-doo"""),
    ),
    "legs": FactKind(
        ("How many legs does {k} have?", "Count the legs of {k}.", "How many legs has {k}?"),
        "{k} has {v} legs.",
        _table("""a spider=8,a dog=4,a bird=2,an ant=6,a snake=0,a horse=4,a bee=6,a crab=10,
a cat=4,a human=2,a fish=0,a cow=4,a duck=2,a beetle=6"""),
    ),
    "opposite": FactKind(
        ("What is the opposite of {k}?", "Tell me the opposite of {k}.", "Opposite of {k}?"),
        "The opposite of {k} is {v}.",
        _OPPOSITES | {right: left for left, right in _OPPOSITES.items()},
    ),
    "symbol": FactKind(
        (
            "What is the chemical symbol of {k}?",
            "What is the chemical symbol for {k}?",
            "Which symbol has the element {k}?",
            "Tell me the chemical symbol of {k}.",
        ),
        "The chemical symbol of {k} is {v}.",
        _SYMBOLS,
    ),
    "element": FactKind(
        ("Which element has the symbol {k}?", "{k} is the symbol of which element?"),
        "{k} is the symbol of {v}.",
        {symbol: element for element, symbol in _SYMBOLS.items()},
    ),
    "baby": FactKind(
        ("What is a baby {k} called?", "What do you call a baby {k}?", "Name of a baby {k}?"),
        "A baby {k} is called a {v}.",
        _table("""dog=puppy,cat=kitten,cow=calf,horse=foal,sheep=lamb,pig=piglet,duck=duckling,
goat=kid,bear=cub,deer=fawn,frog=tadpole,goose=gosling"""),
    ),
    "next day": FactKind(
        ("Which day comes after {k}?", "What day is it after {k}?", "What day follows {k}?"),
        "{v} comes after {k}.",
        _table("""Monday=Tuesday,Tuesday=Wednesday,Wednesday=Thursday,Thursday=Friday,
Friday=Saturday,Saturday=Sunday,Sunday=Monday"""),
    ),
    "next month": FactKind(
        ("Which month comes after {k}?", "What month follows {k}?"),
        "{v} comes after {k}.",
        _table("""January=February,February=March,March=April,April=May,May=June,June=July,
July=August,August=September,September=October,October=November,November=December,
December=January"""),
    ),
}
