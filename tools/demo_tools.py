"""The families of tools in the demo corpus: what they are called, and what is asked of them.

A family has one meaning under many names, descriptions and argument names, so the model has to
read the signatures in the prompt instead of learning them by heart.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tools.demo_chat import Json
from tools.demo_turns import with_article
from tools.demo_words import DAYS, ITEMS, LANGUAGES, ROOMS, WORDS, Source


@dataclass(frozen=True)
class ToolUse:
    """One use of a tool: the question, the argument values in order, the result and the answer."""

    question: str
    arguments: tuple[Json, ...]
    result: dict[str, Json]
    answer: str


@dataclass(frozen=True)
class Family:
    """`parameters` gives the possible names of each argument."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[tuple[str, ...], ...]
    types: tuple[str, ...]
    draw: Callable[[Source], ToolUse]


def draw_weather(source: Source) -> ToolUse:
    city, degrees = source.city(), source.rng.randint(-9, 39)
    sky = source.pick(("sunny", "cloudy", "rainy", "windy", "foggy", "snowy"))
    question = source.pick(
        (
            "What is the weather in {}?",
            "How is the weather in {}?",
            "What's the weather like in {} today?",
        )
    ).format(city)
    result: dict[str, Json] = {"temperature": degrees, "condition": sky}
    return ToolUse(question, (city,), result, f"It is {sky} and {degrees} degrees in {city}.")


def _time(source: Source) -> ToolUse:
    city = source.city()
    clock = f"{source.rng.randint(0, 23):02}:{source.rng.randint(0, 59):02}"
    question = source.pick(
        ("What time is it in {}?", "Tell me the time in {}.", "How late is it in {}?")
    )
    return ToolUse(question.format(city), (city,), {"time": clock}, f"It is {clock} in {city}.")


def _add(source: Source) -> ToolUse:
    a, b = source.rng.randint(0, 9999), source.rng.randint(0, 9999)
    question = source.pick(("What is {} + {}?", "Add {} and {}.", "What is {} plus {}?")).format(
        a, b
    )
    return ToolUse(question, (a, b), {"result": a + b}, f"{a} + {b} = {a + b}.")


def _multiply(source: Source) -> ToolUse:
    a, b = source.rng.randint(2, 999), source.rng.randint(2, 999)
    question = source.pick(
        ("What is {} times {}?", "Multiply {} by {}.", "What is {} * {}?")
    ).format(a, b)
    return ToolUse(question, (a, b), {"result": a * b}, f"{a} * {b} = {a * b}.")


def _search(source: Source) -> ToolUse:
    topic, found = " ".join(source.words(source.rng.randint(1, 3))), source.sentence()
    question = source.pick(("Search for {}.", "Look up {}.", "Find information about {}.")).format(
        topic
    )
    return ToolUse(question, (topic,), {"result": found}, f"I found this: {found}")


def _price(source: Source) -> ToolUse:
    item, price = source.pick(ITEMS), source.rng.randint(1, 999)
    question = source.pick(
        ("How much does {} cost?", "What is the price of {}?", "What does {} cost?")
    )
    thing = with_article(item)
    return ToolUse(
        question.format(thing), (item,), {"price": price}, f"The {item} costs {price} dollars."
    )


def _message(source: Source) -> ToolUse:
    name, text = source.name(), source.sentence()
    question = source.pick(("Send {} this message: {}", "Write to {}: {}", "Tell {} this: {}"))
    return ToolUse(
        question.format(name, text),
        (name, text),
        {"status": "sent"},
        f"I sent the message to {name}.",
    )


def _timer(source: Source) -> ToolUse:
    minutes = source.rng.randint(2, 99)
    question = source.pick(
        ("Set a timer for {} minutes.", "Start a {} minute timer.", "Wake me in {} minutes.")
    )
    return ToolUse(
        question.format(minutes),
        (minutes,),
        {"status": "started"},
        f"The timer runs for {minutes} minutes.",
    )


def _translate(source: Source) -> ToolUse:
    word, language, translation = source.pick(WORDS), source.pick(LANGUAGES), source.made_up()
    question = source.pick(
        ("Translate {} into {}.", "What is {} in {}?", "How do you say {} in {}?")
    )
    return ToolUse(
        question.format(word, language),
        (word, language),
        {"translation": translation},
        f"In {language} it is {translation}.",
    )


def _light(source: Source) -> ToolUse:
    room, state = source.pick(ROOMS), source.pick(("on", "off"))
    question = source.pick(
        ("Turn {1} the light in the {0}.", "Switch {1} the {0} light.", "Light {1} in the {0}.")
    )
    return ToolUse(
        question.format(room, state),
        (room, state),
        {"status": "done"},
        f"The light in the {room} is {state}.",
    )


def _book(source: Source) -> ToolUse:
    city, people, day = source.city(), source.rng.randint(1, 12), source.pick(DAYS)
    question = source.pick(
        ("Book a table for {1} in {0} on {2}.", "Reserve a table in {0} for {1} on {2}.")
    )
    return ToolUse(
        question.format(city, people, day),
        (city, people, day),
        {"status": "booked"},
        f"Your table for {people} in {city} on {day} is booked.",
    )


FAMILIES: tuple[Family, ...] = (
    Family(
        (
            "get_weather",
            "weather",
            "get_current_weather",
            "weather_lookup",
            "fetch_weather",
            "city_weather",
        ),
        (
            "Get the current weather in a city.",
            "Get the weather.",
            "Weather for a place",
            "Returns the weather.",
        ),
        (("city", "location", "place", "town"),),
        ("string",),
        draw_weather,
    ),
    Family(
        ("get_time", "current_time", "get_local_time", "time_in_city", "clock", "local_time"),
        (
            "Get the current time in a city.",
            "Get the time.",
            "Local time of a place",
            "Returns the time.",
        ),
        (("city", "location", "place", "town"),),
        ("string",),
        _time,
    ),
    Family(
        ("add", "add_numbers", "sum", "calculate_sum", "plus", "get_sum"),
        ("Add two numbers.", "Returns the sum of two numbers.", "Addition"),
        (("a", "x", "first", "left"), ("b", "y", "second", "right")),
        ("integer", "integer"),
        _add,
    ),
    Family(
        ("multiply", "multiply_numbers", "product", "times", "get_product"),
        ("Multiply two numbers.", "Returns the product of two numbers.", "Multiplication"),
        (("a", "x", "first", "left"), ("b", "y", "second", "right")),
        ("integer", "integer"),
        _multiply,
    ),
    Family(
        ("search", "web_search", "search_web", "lookup", "find", "search_query"),
        ("Search the web.", "Search for information.", "Look something up"),
        (("query", "q", "text", "topic"),),
        ("string",),
        _search,
    ),
    Family(
        ("get_price", "price_lookup", "item_price", "check_price", "price"),
        (
            "Get the price of an item.",
            "Returns the price of a product.",
            "Price of an item in the shop",
        ),
        (("item", "product", "name", "article"),),
        ("string",),
        _price,
    ),
    Family(
        ("send_message", "send_email", "message", "write_message", "send_text"),
        ("Send a message to a person.", "Sends a text to somebody.", "Write to a person"),
        (("recipient", "to", "name", "person"), ("text", "message", "body", "content")),
        ("string", "string"),
        _message,
    ),
    Family(
        ("set_timer", "start_timer", "timer", "create_timer", "new_timer"),
        ("Start a timer.", "Set a timer in minutes.", "Timer"),
        (("minutes", "duration", "time", "length"),),
        ("integer",),
        _timer,
    ),
    Family(
        ("translate", "translate_word", "get_translation", "translate_text", "translator"),
        ("Translate a word.", "Translate text into another language.", "Returns a translation."),
        (("text", "word", "input"), ("language", "target", "to")),
        ("string", "string"),
        _translate,
    ),
    Family(
        ("set_light", "switch_light", "light", "control_light", "light_switch"),
        ("Turn a light on or off.", "Switch the light in a room.", "Controls a light"),
        (("room", "place", "location"), ("state", "mode", "value")),
        ("string", "string"),
        _light,
    ),
    Family(
        ("book_table", "reserve_table", "make_reservation", "book_restaurant", "table_booking"),
        ("Book a table in a restaurant.", "Reserve a table.", "Restaurant booking"),
        (("city", "place", "location"), ("people", "guests", "seats"), ("day", "date", "when")),
        ("string", "integer", "string"),
        _book,
    ),
)

# With one of these at hand, plain arithmetic has two right answers.
CALCULATORS = (_add, _multiply)
