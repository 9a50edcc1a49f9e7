"""The demo corpus: an endless, seeded stream of chats, each ending in an answer that can be judged.

Public: `sample_chat` draws from a training mixture, `TASKS` draws one task, `is_correct` judges.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tools.demo_chat import Chat, Message, answer_text, assistant, user
from tools.demo_story import is_story
from tools.demo_tool_calls import tool_answer_chat, tool_call_chat, tool_none_chat
from tools.demo_turns import TURNS, Turn, json_answer, with_article
from tools.demo_words import ANIMALS, COLOURS, FOODS, JOBS, Source

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are Manta, a helpful assistant.",
    "Answer the questions of the user.",
    "Be brief and friendly.",
)
JSON_SYSTEM_PROMPT = "Always answer in JSON."

# What fills the turns between telling something and asking for it; stories are long, thus rare.
FILLERS = (
    "arithmetic",
    "arithmetic",
    "facts",
    "facts",
    "talk",
    "repeat",
    "reverse",
    "json",
    "story",
)


@dataclass(frozen=True)
class Attribute:
    """Something a user tells about themself and asks back later."""

    tells: tuple[str, ...]
    reply: str
    asks: tuple[str, ...]
    answer: str
    unknown: str
    draw: Callable[[Source], str]


ATTRIBUTES: dict[str, Attribute] = {
    "name": Attribute(
        ("My name is {}.", "I am {}.", "Hi, I'm {}.", "Hello, my name is {}.", "Call me {}."),
        "Nice to meet you, {}.",
        ("What is my name?", "What's my name?", "Do you remember my name?", "Tell me my name."),
        "Your name is {}.",
        "You have not told me your name.",
        lambda source: source.name(),
    ),
    "town": Attribute(
        ("I live in {}.", "My home is in {}.", "I come from {}."),
        "{} sounds like a nice place.",
        ("Where do I live?", "Which town do I live in?", "What is my town?"),
        "You live in {}.",
        "You have not told me where you live.",
        lambda source: source.city(),
    ),
    "colour": Attribute(
        ("My favourite colour is {}.", "I like the colour {}.", "My favorite color is {}."),
        "I will remember that you like {}.",
        ("What is my favourite colour?", "Which colour do I like?", "What is my favorite color?"),
        "Your favourite colour is {}.",
        "You have not told me your favourite colour.",
        lambda source: source.pick(COLOURS),
    ),
    "pet": Attribute(
        ("I have a pet called {}.", "My pet is called {}.", "The name of my pet is {}."),
        "{} is a lovely name for a pet.",
        ("What is my pet called?", "What is the name of my pet?", "How is my pet called?"),
        "Your pet is called {}.",
        "You have not told me the name of your pet.",
        lambda source: source.name(),
    ),
    "animal": Attribute(
        ("My favourite animal is the {}.", "The animal I like most is the {}."),
        "The {} is a fine animal.",
        ("What is my favourite animal?", "Which animal do I like most?"),
        "Your favourite animal is the {}.",
        "You have not told me your favourite animal.",
        lambda source: source.pick(ANIMALS),
    ),
    "food": Attribute(
        ("My favourite food is {}.", "I like to eat {}."),
        "I have never tried {}.",
        ("What is my favourite food?", "What do I like to eat?"),
        "Your favourite food is {}.",
        "You have not told me your favourite food.",
        lambda source: source.pick(FOODS),
    ),
    "job": Attribute(
        ("I work as {}.", "I am {} by trade.", "My job: I am {}."),
        "It must be interesting to be {}.",
        ("What is my job?", "What do I work as?"),
        "You work as {}.",
        "You have not told me your job.",
        lambda source: with_article(source.pick(JOBS)),
    ),
    "age": Attribute(
        ("I am {} years old.", "My age is {}."),
        "I will remember that you are {}.",
        ("How old am I?", "What is my age?"),
        "You are {} years old.",
        "You have not told me your age.",
        lambda source: str(source.rng.randint(3, 99)),
    ),
}


def turns_chat(source: Source, task: str) -> Chat:
    """One to five turns of one task; long ones come alone."""
    subject = ""
    if task == "json" and source.chance(0.15):
        plain, answer = json_answer(source)
        messages: list[Message] = [{"role": "system", "content": JSON_SYSTEM_PROMPT}]
        return Chat(task, [*messages, user(plain.user), assistant(answer)])
    count = 1 if task in ("story", "count") else source.rng.randint(1, 5)
    turns = [TURNS[task](source) for _ in range(count)]
    if task == "story":
        subject = turns[-1].user.rstrip(".").split()[-1]
    return Chat(task, _opening(source) + _messages(turns), subject=subject)


def mixed_chat(source: Source) -> Chat:
    turns = [TURNS[source.pick(FILLERS)](source) for _ in range(source.rng.randint(2, 8))]
    last = TURNS[source.pick([task for task in TURNS if task != "story"])](source)
    return Chat("mixed", _opening(source) + _messages([*turns, last]))


def memory_chat(source: Source) -> Chat:
    """Tells one to four things, talks of others, asks back; one chat in eight is long."""
    count = source.rng.randint(1, 4)
    topics = source.rng.sample(sorted(ATTRIBUTES), count + 1)
    untold, told = topics[0], {topic: ATTRIBUTES[topic].draw(source) for topic in topics[1:]}
    turns = [_tell(source, topic, value) for topic, value in told.items()]
    fillers = source.rng.randint(10, 24) if source.chance(0.12) else source.rng.randint(0, 4)
    for _ in range(fillers):
        turns.insert(source.rng.randint(0, len(turns)), TURNS[source.pick(FILLERS)](source))
    if source.chance(0.1):
        topic = source.pick(list(told))
        told[topic] = ATTRIBUTES[topic].draw(source)
        tell = ATTRIBUTES[topic].tells[0].format(told[topic]).replace("My", "my", 1)
        turns.append(Turn(f"Actually, {tell}", ATTRIBUTES[topic].reply.format(told[topic])))
    for topic in source.rng.sample(list(told), source.rng.randint(1, count)):
        turns.append(_ask(source, topic, told[topic]))
    if source.chance(0.1):
        turns.append(Turn(source.pick(ATTRIBUTES[untold].asks), ATTRIBUTES[untold].unknown))
    return Chat("memory", _opening(source) + _messages(turns))


TASKS: dict[str, Callable[[Source], Chat]] = {
    **{task: lambda source, task=task: turns_chat(source, task) for task in TURNS},  # type: ignore[misc]
    "memory": memory_chat,
    "mixed": mixed_chat,
    "tool_call": tool_call_chat,
    "tool_answer": tool_answer_chat,
    "tool_none": tool_none_chat,
}

# Shares of chats, not of tokens: what is hard to learn per token (reversal, sums) is drawn often.
MIXTURE: dict[str, float] = {
    "arithmetic": 0.20,
    "facts": 0.12,
    "repeat": 0.07,
    "reverse": 0.11,
    "count": 0.03,
    "json": 0.09,
    "story": 0.03,
    "talk": 0.03,
    "memory": 0.14,
    "mixed": 0.05,
    "tool_call": 0.05,
    "tool_answer": 0.05,
    "tool_none": 0.03,
}


# Later, facts are known and short answers copied: calls, sums and order are what is left.
LATE_MIXTURE: dict[str, float] = {
    "arithmetic": 0.20,
    "facts": 0.05,
    "repeat": 0.04,
    "reverse": 0.10,
    "count": 0.08,
    "json": 0.16,
    "story": 0.015,
    "talk": 0.015,
    "memory": 0.10,
    "mixed": 0.03,
    "tool_call": 0.13,
    "tool_answer": 0.07,
    "tool_none": 0.01,
}


# At the end, what is still wrong now and then: long sums, counts and calls.
LAST_MIXTURE: dict[str, float] = {
    "arithmetic": 0.26,
    "facts": 0.02,
    "repeat": 0.02,
    "reverse": 0.09,
    "count": 0.10,
    "json": 0.11,
    "story": 0.01,
    "talk": 0.01,
    "memory": 0.05,
    "mixed": 0.01,
    "tool_call": 0.20,
    "tool_answer": 0.09,
    "tool_none": 0.03,
}


def sample_chat(source: Source, mixture: dict[str, float] = MIXTURE) -> Chat:
    task = source.rng.choices(list(mixture), weights=list(mixture.values()))[0]
    return TASKS[task](source)


def held_out_chat(task: str, index: int) -> Chat:
    """Example `index` of the evaluation of a task: own seed, held-out names and towns."""
    return TASKS[task](Source(Random(f"held out {task} {index}"), held_out=True))


def expected_answer(chat: Chat) -> str:
    return answer_text(chat.messages[-1])


def is_correct(chat: Chat, answer: str) -> bool:
    """Stories are free within their grammar; everything else has one right answer."""
    if chat.task == "story":
        return is_story(answer, chat.subject)
    return answer == expected_answer(chat)


def _opening(source: Source) -> list[Message]:
    if source.chance(0.6):
        return []
    # Random words teach that an unknown system prompt changes nothing.
    content = source.sentence() if source.chance(0.2) else source.pick(SYSTEM_PROMPTS)
    return [{"role": "system", "content": content}]


def _messages(turns: list[Turn]) -> list[Message]:
    return [message for turn in turns for message in (user(turn.user), assistant(turn.assistant))]


def _tell(source: Source, topic: str, value: str) -> Turn:
    attribute = ATTRIBUTES[topic]
    return Turn(source.pick(attribute.tells).format(value), attribute.reply.format(value))


def _ask(source: Source, topic: str, value: str) -> Turn:
    attribute = ATTRIBUTES[topic]
    return Turn(source.pick(attribute.asks), attribute.answer.format(value))
