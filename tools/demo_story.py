"""The story grammar: writes a short story about a subject, and tells whether a text is one.

A story walks once through the stages below, so a greedy reader of it cannot fall into a loop.
"""

import re
from functools import cache

from tools.demo_words import Source, split_words

SUBJECTS = split_words("""
    fox bear cat dog dragon king queen robot wizard mouse owl wolf pirate princess farmer rabbit
    turtle lion knight frog giant witch sailor horse whale
""")

SLOTS: dict[str, list[str]] = {
    "adjective": split_words("small tall brave clever lonely young happy shy gentle hungry"),
    "place": split_words("forest village castle valley cave town garden mountain harbor desert"),
    "thing": split_words("key lamp map coin stone feather book bell ring rope"),
    "friend": split_words("bird mouse child goat crow deer baker traveller snail bee"),
    "mood": split_words("happy sad afraid curious proud tired calm glad"),
    "weather": ["rain", "snow", "wind", "fog", "thunder", "sunshine"],
}

# Every stage is one sentence; those whose first entry is empty may be left out.
STAGES: tuple[tuple[str, ...], ...] = (
    (
        "Once upon a time there was a {adjective} {subject} who lived in a {place}.",
        "Long ago a {adjective} {subject} lived near a {place}.",
        "There once was a {subject} in a {place} who was very {adjective}.",
    ),
    (
        "",
        "Every morning the {subject} walked to the {place} and looked for a {thing}.",
        "The {subject} had a {thing} and kept it under the bed.",
        "Nobody in the {place} knew the {subject} very well.",
    ),
    (
        "One day the {subject} found a {thing} in the {place}.",
        "One night there was much {weather} and the {subject} could not sleep.",
        "One evening the {subject} lost a {thing} on the way home.",
    ),
    (
        "",
        "The {subject} felt {mood} and did not know what to do.",
        "This made the {subject} very {mood}.",
    ),
    (
        "Then a {adjective} {friend} came by and asked for help.",
        "Then the {subject} met a {friend} who was {mood}.",
        "Soon a {friend} came out of the {place} with a {thing}.",
    ),
    (
        "",
        'The {friend} said: "Come with me to the {place}."',
        'The {subject} said: "Let us share the {thing}."',
        'The {friend} asked: "Why are you so {mood}?"',
    ),
    (
        "Together they walked through the {weather} until they reached the {place}.",
        "They searched the whole {place} and at last they found the {thing}.",
        "They sat down beside the {place} and talked until the morning.",
    ),
    (
        "",
        "The {weather} stopped and the {place} was quiet again.",
        "From that day on the {friend} visited every week.",
        "The {subject} gave the {thing} to the {friend}.",
    ),
    (
        "In the end the {subject} was {mood} and went home.",
        "And so the {subject} and the {friend} became good friends.",
        "After that the {subject} never felt lonely again.",
    ),
    ("The end.",),
)


def write_story(source: Source, subject: str) -> str:
    # One draw per slot keeps the story coherent: the key that was lost is the key that is found.
    slots = {slot: source.pick(words) for slot, words in SLOTS.items()} | {"subject": subject}
    sentences = [source.pick(stage).format(**slots) for stage in STAGES]
    return " ".join(sentence for sentence in sentences if sentence)


def is_story(text: str, subject: str) -> bool:
    """Whether `text` parses under the grammar and is about `subject`."""
    return _story_pattern(subject).fullmatch(text) is not None


@cache
def _story_pattern(subject: str) -> re.Pattern[str]:
    return re.compile(r"\s*".join(_stage_pattern(stage, subject) for stage in STAGES))


def _stage_pattern(stage: tuple[str, ...], subject: str) -> str:
    variants = [_sentence_pattern(sentence, subject) for sentence in stage if sentence]
    return f"(?:{'|'.join(variants)})" + ("?" if "" in stage else "")


def _sentence_pattern(sentence: str, subject: str) -> str:
    pattern = re.escape(sentence).replace(re.escape("{subject}"), re.escape(subject))
    for slot, words in SLOTS.items():
        pattern = pattern.replace(re.escape("{" + slot + "}"), f"(?:{'|'.join(words)})")
    return pattern
