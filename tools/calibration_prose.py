"""English registers for the calibration text: essays, mails, tables, recipes, sums with units.

Each writer draws one text of its kind; slots are filled from word lists, numbers are computed.
"""

from collections.abc import Callable

from tools.demo_words import (
    ANIMALS,
    CITIES,
    COLOURS,
    DAYS,
    FOODS,
    HELD_OUT_CITIES,
    ITEMS,
    JOBS,
    ROOMS,
    WORDS,
    Source,
    split_words,
)  # fmt: skip

MONTHS = split_words("""January February March April May June July August September October
    November December""")
TOPICS = (
    "public libraries", "solar panels", "the water cycle", "bicycle lanes", "bread baking",
    "the history of clocks", "coral reefs", "chess openings", "railway bridges", "beekeeping",
    "remote work", "volcanoes", "the printing press", "urban gardens", "sleep", "glaciers",
    "vaccines", "the invention of paper", "migrating birds", "compilers", "black holes",
    "open-source software", "tidal power", "violin making", "earthquakes", "the silk road",
)  # fmt: skip
CLAIMS = (
    "Most people know {topic} only from school, where the subject takes a few hours at best.",
    "The first written account of {topic} is older than {years} years, although it is disputed.",
    "In {city}, a group of {count} volunteers has collected data on {topic} since {year}.",
    "According to a survey from {year}, {percent} percent of adults could explain {topic}.",
    "Critics point out that the costs are high: about {money} million dollars in {year} alone.",
    "However, the evidence is mixed, and careful authors avoid general conclusions.",
    "A simple experiment shows the principle: two equal vessels are filled with {adjective} water, "
    "and only one of them is covered.",
    "What makes {topic} difficult is not the theory but the {adjective} detail of daily practice.",
    "{name}, who has taught the subject for {count} years, puts it differently: "
    '"You learn it by doing it badly first."',
    "By {year}, the number of installations had grown from {count} to more than {money},000.",
    "Some effects are visible at once; others appear only after years, when nobody measures any "
    "more.",
    "If the temperature falls below {degrees} degrees, the process slows down and finally stops.",
    "There are three reasons for this: habit, price and the lack of a clear rule.",
    "Neither side was willing to publish its figures, which did not help the discussion.",
    "It would be wrong, though, to call {topic} a modern idea.",
    "Compared with {year}, the share has more than doubled, from {small} to {percent} percent.",
)  # fmt: skip
BUILDINGS = split_words("bridge school tunnel theatre harbour library stadium market")
ADJECTIVES = split_words("warm careful narrow quiet recent unusual simple heavy distant reliable")
UNITS = (
    ("kilometres", "metres", 1000), ("hours", "minutes", 60), ("kilograms", "grams", 1000),
    ("metres", "centimetres", 100), ("days", "hours", 24), ("litres", "millilitres", 1000),
    ("minutes", "seconds", 60), ("weeks", "days", 7), ("megabytes", "kilobytes", 1000),
)  # fmt: skip


def _fill(source: Source, template: str, topic: str) -> str:
    return template.format(
        topic=topic,
        city=source.city(),
        name=source.name(),
        year=source.rng.randint(1780, 2024),
        years=source.rng.randint(3, 40) * 100,
        count=source.rng.randint(6, 90),
        percent=source.rng.randint(31, 94),
        small=source.rng.randint(3, 29),
        money=source.rng.randint(2, 900),
        degrees=source.rng.randint(-20, 15),
        adjective=source.pick(ADJECTIVES),
    )


def essay(source: Source) -> str:
    topic = source.pick(TOPICS)
    claims = iter(source.rng.sample(CLAIMS, source.rng.randint(5, 12)))
    paragraphs: list[list[str]] = [[]]
    for claim in claims:
        if len(paragraphs[-1]) >= 3 and source.chance(0.6):
            paragraphs.append([])
        paragraphs[-1].append(_fill(source, claim, topic))
    title = f"# {topic[0].upper()}{topic[1:]}\n\n" if source.chance(0.5) else ""
    return title + "\n\n".join(" ".join(sentences) for sentences in paragraphs)


def mail(source: Source) -> str:
    sender, recipient = source.name(), source.name()
    item, day = source.pick(ITEMS), source.pick(DAYS)
    date = f"{source.rng.randint(1, 28)} {source.pick(MONTHS)}"
    bodies = (
        f"thank you for your order of {source.rng.randint(2, 40)} {item}s. They will be sent on "
        f"{day}, {date}. The invoice over ${source.rng.randint(20, 4000)}."
        f"{source.rng.randint(0, 99):02} is attached.",
        f"I am sorry that I have to move our meeting on {day}. Would {date} at "
        f"{source.rng.randint(8, 18)}:30 suit you as well? We could meet in {source.city()} or "
        f"talk on the phone: +44 {source.rng.randint(10**9, 10**10 - 1)}.",
        f"the {item} that I bought from you in {source.pick(MONTHS)} is broken: the "
        f"{source.pick(COLOURS)} part came off after {source.rng.randint(2, 20)} days. Please tell "
        "me whether you will repair it or refund the price.",
        f"our flat in {source.city()} is free from {date}. It has {source.rng.randint(2, 5)} "
        f"rooms, a {source.pick(ROOMS)} and a view of the park; the rent is "
        f"{source.rng.randint(400, 2500)} euros a month, heating included.",
    )
    closing = source.pick(("Kind regards,", "Best wishes,", "Yours sincerely,", "Cheers,"))
    return (
        f"From: {sender.lower()}@example.com\nTo: {recipient.lower()}@example.org\n"
        f"Subject: {item.capitalize()}, {date}\n\nDear {recipient},\n\n{source.pick(bodies)}\n\n"
        f"{closing}\n{sender}"
    )


def table(source: Source) -> str:
    items = source.rng.sample(ITEMS, source.rng.randint(3, 7))
    rows = [
        (item, source.rng.randint(1, 60), source.rng.randint(100, 9999) / 100) for item in items
    ]
    total = sum(count * price for _, count, price in rows)
    if source.chance(0.4):
        lines = ["item,count,price", *(f"{i},{c},{p:.2f}" for i, c, p in rows)]
        return "\n".join(lines)
    lines = ["| Item | Count | Price |", "|---|---:|---:|"]
    lines += [f"| {item} | {count} | {price:.2f} |" for item, count, price in rows]
    return "\n".join([*lines, "", f"The {len(rows)} lines add up to {total:.2f}."])


def recipe(source: Source) -> str:
    food = source.pick(FOODS)
    parts = source.rng.sample(
        ("flour", "butter", "salt", "onions", "milk", "eggs", "oil", "sugar", "pepper", "garlic"),
        source.rng.randint(4, 7),
    )
    lines = [f"{source.rng.randint(1, 40) * 10} g of {part}" for part in parts]
    steps = (
        f"Mix the {parts[0]} with the {parts[1]} until smooth.",
        f"Heat the {parts[2]} in a pan and add the rest.",
        f"Stir for {source.rng.randint(3, 15)} minutes over a low flame.",
        f"Bake at {source.rng.randint(14, 24) * 10} °C for {source.rng.randint(15, 60)} minutes.",
        f"Let it cool, then serve with {source.pick(FOODS)}.",
    )
    kept = [step for step in steps if source.chance(0.8)] or list(steps)
    return (
        f"## {food.capitalize()} for {source.rng.randint(2, 8)}\n\n"
        + "".join(f"- {line}\n" for line in lines)
        + "\n"
        + "\n".join(f"{number}. {step}" for number, step in enumerate(kept, start=1))
    )


def script(source: Source) -> str:
    """A dialogue of two people who want something of each other."""
    first, second = source.name(), source.name()
    thing, city = source.pick(ITEMS), source.city()
    lines = (
        f"Have you seen my {thing}? I left it in the {source.pick(ROOMS)}.",
        f"No. But your {source.pick(ANIMALS)} was in there this morning.",
        f"That explains a lot. We leave for {city} in {source.rng.randint(5, 50)} minutes.",
        f"Then take mine. It is {source.pick(COLOURS)}, and it works on {source.pick(DAYS)}s only.",
        "Very funny. What do you want for it?",
        f"{source.rng.randint(5, 90)} euros, or you cook {source.pick(FOODS)} for a week.",
        "Half of that, and you carry the bags.",
        "Deal. Wait, what is in the bags?",
        f"{source.rng.randint(2, 12)} {source.pick(ITEMS)}s. Don't ask.",
    )
    end = source.rng.randint(4, len(lines))
    pairs = zip((first, second) * 5, lines[:end], strict=False)
    return "\n".join(f"{name}: {line}" for name, line in pairs)


def readme(source: Source) -> str:
    name, other = source.rng.sample(WORDS, 2)
    options = source.rng.sample(WORDS, 3)
    return (
        f"# {name}-{other}\n\nA small tool that turns {other} files into {name} files.\n\n"
        f"## Install\n\n    pip install {name}-{other}\n\n## Use\n\n    {name} input.{other} "
        f"--{options[0]} {source.rng.randint(1, 64)} --{options[1]}\n\n"
        f"* `--{options[0]} N`: at most N pieces at a time (default {source.rng.randint(1, 64)})\n"
        f"* `--{options[1]}`: keep the **original** file\n* `--{options[2]} FILE`: "
        f"write *everything* to FILE\n\nNeeds Python 3.{source.rng.randint(8, 14)} or newer. "
        f"Version {source.rng.randint(0, 4)}.{source.rng.randint(0, 20)}, "
        f"{source.pick(MONTHS)} {source.rng.randint(2010, 2025)}."
    )


def news(source: Source) -> str:
    city = source.city()
    return (
        f"{city.upper()}, {source.pick(MONTHS)[:3]}. {source.rng.randint(1, 28)} - The council of "
        f"{city} decided on {source.pick(DAYS)} to spend ${source.rng.randint(1, 90)}."
        f"{source.rng.randint(0, 9)} million on a new {source.pick(BUILDINGS)}. "
        f"{source.rng.randint(12, 40)} members voted for the plan, {source.rng.randint(1, 11)} "
        f"against it. \"It is a good day for the {source.pick(JOBS)}s of this town,\" said "
        f"{source.name()} {source.made_up().capitalize()}, {source.rng.randint(25, 80)}, who had "
        f"asked for it since {source.rng.randint(1990, 2020)}. Work begins in "
        f"{source.pick(MONTHS)}; shares of the builder rose by {source.rng.randint(1, 120) / 10} %."
    )  # fmt: skip


def conversion(source: Source) -> tuple[str, str]:
    large, small, factor = source.pick(UNITS)
    count = source.rng.randint(2, 400)
    return (
        source.pick(("How many {0} are {1} {2}?", "Convert {1} {2} to {0}."))
        .format(small, count, large),
        f"One of the {large} has {factor:,} {small}, so {count} {large} are {count} × {factor:,} = "
        f"{count * factor:,} {small}.",
    )  # fmt: skip


def word_problem(source: Source) -> tuple[str, str]:
    """A sum in words, solved step by step."""
    name, item = source.name(), source.pick(ITEMS)
    count, price, paid = (source.rng.randint(*r) for r in ((2, 12), (2, 40), (500, 1000)))
    total = count * price
    return (
        f"{name} buys {count} {item}s at {price} dollars each and pays with {paid} dollars. How "
        "much change is there?",
        f"Step 1: {count} {item}s cost {count} × {price} = {total} dollars.\nStep 2: {paid} − "
        f"{total} = {paid - total}.\n\n{name} gets **{paid - total} dollars** back.",
    )


def explanation(source: Source) -> tuple[str, str]:
    topic = source.pick(TOPICS)
    points = source.rng.sample(CLAIMS, 3)
    return (
        source.pick(("Tell me three things about {}.", "What is known about {}?", "{}: facts?"))
        .format(topic),
        "Here are three points:\n\n"
        + "\n".join(f"{i}. {_fill(source, each, topic)}" for i, each in enumerate(points, start=1)),
    )  # fmt: skip


def trip(source: Source) -> tuple[str, str]:
    cities = source.rng.sample(HELD_OUT_CITIES if source.held_out else CITIES, 3)
    day, month = source.rng.randint(1, 20), source.pick(MONTHS)
    plan = "\n".join(
        f"- **{month} {day + i}**: {city}, hotel at {source.rng.randint(40, 300)} euros a night"
        for i, city in enumerate(cities)
    )
    return (
        f"Plan three days in {cities[0]}, {cities[1]} and {cities[2]} from {month} {day}.",
        f"Here is a plan:\n\n{plan}\n\nTake the early train each day; it is cheaper.",
    )


TEXTS: tuple[Callable[[Source], str], ...] = (
    essay, essay, essay, mail, table, recipe, script, readme, news, news,
)  # fmt: skip
ANSWERS: tuple[Callable[[Source], tuple[str, str]], ...] = (
    conversion, word_problem, explanation, explanation, trip,
)  # fmt: skip
