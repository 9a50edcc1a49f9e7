"""The tasks of one question and one answer: arithmetic, facts, repeating, counting, JSON, talk.

Each function draws one turn from a source. Chats, memory and tools are built from turns elsewhere.
"""

import json
from collections.abc import Callable
from typing import NamedTuple

from tools.demo_facts import FACTS, FactKind
from tools.demo_story import SUBJECTS, write_story
from tools.demo_words import COLOURS, JOBS, Source


class Turn(NamedTuple):
    user: str
    assistant: str


SUM_PHRASINGS = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
    "{a} + {b}",
    "{a}+{b}=",
    "Calculate {a} + {b}.",
    "How much is {a} plus {b}?",
    "What is the sum of {a} and {b}?",
    "Compute {a}+{b}.",
    "What do you get if you add {b} to {a}?",
)
DIFFERENCE_PHRASINGS = (
    "What is {a} - {b}?",
    "What is {a} minus {b}?",
    "Subtract {b} from {a}.",
    "{a} - {b}",
    "{a}-{b}=",
    "Calculate {a} - {b}.",
    "How much is {a} minus {b}?",
    "Take {b} away from {a}.",
    "Compute {a}-{b}.",
    "What do you get if you take {b} from {a}?",
)
MAX_OPERAND = 99

REPEAT_PHRASINGS = (
    "Repeat these words: {words}.",
    "Say these words: {words}.",
    "Repeat the words {words}.",
    "Please repeat this list: {words}.",
)
REVERSE_PHRASINGS = (
    "Say these words backwards: {words}.",
    "Repeat these words in reverse order: {words}.",
    "Reverse this list: {words}.",
    "Repeat these words backwards: {words}.",
)
MAX_WORDS = 8

JSON_QUESTION_PHRASINGS = (
    "Answer in JSON: {question}",
    "Reply in JSON: {question}",
    "Answer as a JSON object: {question}",
    "{question} Answer in JSON.",
    "{question} Give me JSON.",
)
JSON_FIELDS_PHRASINGS = (
    "Give me JSON with {fields}: {text}",
    "Turn this into JSON with {fields}: {text}",
    "Write JSON with the keys {fields}: {text}",
    "Extract {fields} as JSON: {text}",
)

TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello!", "Hi!", "Hello.", "Hi there!", "Hey!", "Good morning!"),
        "Hello! How can I help you?",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Introduce yourself."),
        "I am Manta's demo model, a very small language model trained from scratch.",
    ),
    (
        ("What can you do?", "How can you help me?", "What do you know?", "Help"),
        "I can add and subtract, remember what you tell me, repeat words, count, "
        "answer in JSON, call tools and tell stories.",
    ),
    (("Thank you!", "Thanks!", "Thank you very much.", "Thanks a lot."), "You are welcome!"),
    (("How are you?", "How are you today?", "How do you do?"), "I am fine, thank you."),
    (("Goodbye!", "Bye!", "See you later.", "Good night!"), "Goodbye!"),
    (
        ("Are you human?", "Are you a robot?", "Are you a real person?"),
        "No, I am a language model.",
    ),
    (("Who made you?", "Who built you?", "Where do you come from?"), "I was trained for Manta."),
    (("Yes.", "OK.", "Good.", "Great!", "Nice."), "What else can I do for you?"),
)


def arithmetic_turn(source: Source) -> Turn:
    a, b = source.rng.randint(0, MAX_OPERAND), source.rng.randint(0, MAX_OPERAND)
    if source.chance(0.5):
        return Turn(_ask(source, SUM_PHRASINGS, a, b), f"{a} + {b} = {a + b}.")
    return Turn(_ask(source, DIFFERENCE_PHRASINGS, a, b), f"{a} - {b} = {a - b}.")


def fact_turn(source: Source) -> Turn:
    kind, key = _draw_fact(source)
    question = _loosen(source, _capitalise(source.pick(kind.questions).format(k=key)))
    return Turn(question, _capitalise(kind.answer.format(k=key, v=kind.table[key])))


def repeat_turn(source: Source) -> Turn:
    if source.chance(0.15):
        sentence = source.sentence()
        return Turn(f"Repeat after me: {sentence}", sentence)
    words = source.words(source.rng.randint(1, MAX_WORDS))
    return Turn(source.pick(REPEAT_PHRASINGS).format(words=", ".join(words)), ", ".join(words))


def reverse_turn(source: Source) -> Turn:
    words = source.words(source.rng.randint(2, MAX_WORDS))
    question = source.pick(REVERSE_PHRASINGS).format(words=", ".join(words))
    return Turn(question, ", ".join(reversed(words)))


def count_turn(source: Source) -> Turn:
    # Short counts are drawn more often: a count to 100 costs as many tokens as 25 other turns.
    length = min(int(2 ** source.rng.uniform(1, 6.8)), 100)
    start = source.pick((1, 1, source.rng.randint(0, 100)))
    numbers = range(start, start + length)
    if source.chance(0.2):
        return Turn(
            f"Count down from {numbers[-1]} to {start}.", ", ".join(map(str, reversed(numbers)))
        )
    question = source.pick(
        ("Count from {a} to {b}.", "Count from {a} up to {b}.", "Please count from {a} to {b}.")
    )
    return Turn(question.format(a=start, b=numbers[-1]), ", ".join(map(str, numbers)))


def json_turn(source: Source) -> Turn:
    if source.chance(0.5):
        return _json_fields_turn(source)
    (question, _), answer = json_answer(source)
    if source.chance(0.3):
        question = question[0].lower() + question[1:]
    return Turn(source.pick(JSON_QUESTION_PHRASINGS).format(question=question), answer)


def json_answer(source: Source) -> tuple[Turn, str]:
    """A plain question with its plain answer, and the same answer as a JSON object."""
    if source.chance(0.75):
        turn = arithmetic_turn(source)
        asked, result = turn.assistant.rstrip(".").split(" = ")
        # Said before its result, as in a plain answer: a small model adds what it just wrote.
        return turn, json.dumps({"question": asked, "answer": int(result)})
    kind, key = _draw_fact(source)
    value = kind.table[key]
    question = _capitalise(source.pick(kind.questions).format(k=key))
    plain = _capitalise(kind.answer.format(k=key, v=value))
    return Turn(question, plain), json.dumps({"answer": int(value) if value.isdigit() else value})


def story_turn(source: Source) -> Turn:
    subject = source.pick(SUBJECTS)
    article = with_article(subject)
    question = source.pick(
        (
            f"Tell me a story about {article}.",
            f"Tell me a short story about {article}.",
            f"Write a story about {article}.",
            f"Please tell me a story about {article}.",
            f"I want to hear a story about {article}.",
        )
    )
    return Turn(question, write_story(source, subject))


def talk_turn(source: Source) -> Turn:
    questions, answer = source.pick(TALK)
    return Turn(_loosen(source, source.pick(questions)), answer)


TURNS: dict[str, Callable[[Source], Turn]] = {
    "arithmetic": arithmetic_turn,
    "facts": fact_turn,
    "repeat": repeat_turn,
    "reverse": reverse_turn,
    "count": count_turn,
    "json": json_turn,
    "story": story_turn,
    "talk": talk_turn,
}


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _json_fields_turn(source: Source) -> Turn:
    name = source.name()
    age = source.rng.randint(1, 99)
    city, job, colour = source.city(), source.pick(JOBS), source.pick(COLOURS)
    clauses: dict[str, tuple[str, str | int]] = {
        "age": (f"is {age}", age),
        "city": (f"lives in {city}", city),
        "job": (f"works as {with_article(job)}", job),
        "colour": (f"likes {colour}", colour),
    }
    chosen = source.rng.sample(sorted(clauses), source.rng.randint(1, 3))
    text = f"{name} {_join([clauses[field][0] for field in chosen])}."
    wanted = source.rng.sample(["name", *chosen], source.rng.randint(2, len(chosen) + 1))
    if source.chance(0.6):
        wanted = ["name", *chosen]
    values = {"name": name} | {field: clauses[field][1] for field in chosen}
    question = source.pick(JSON_FIELDS_PHRASINGS).format(fields=_join(wanted), text=text)
    return Turn(question, json.dumps({field: values[field] for field in wanted}))


def _ask(source: Source, phrasings: tuple[str, ...], a: int, b: int) -> str:
    return _loosen(source, source.pick(phrasings).format(a=a, b=b))


def _draw_fact(source: Source) -> tuple[FactKind, str]:
    kind = source.pick(list(FACTS.values()))
    return kind, source.pick(list(kind.table))


def _loosen(source: Source, question: str) -> str:
    """Sometimes drops the final mark or the capital letter, as people do."""
    if source.chance(0.1):
        question = question.rstrip("?.!")
    if source.chance(0.1):
        question = question[0].lower() + question[1:]
    return question


def _capitalise(text: str) -> str:
    return text[0].upper() + text[1:]


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
