"""Chats with tools: listed, called, answered from, or rightly left alone."""

from dataclasses import dataclass

from tools.demo_chat import Chat, Json, Message, ToolCall, assistant, dump, user
from tools.demo_tools import CALCULATORS, FAMILIES, Family, draw_weather
from tools.demo_turns import Turn, arithmetic_turn, fact_turn, repeat_turn, talk_turn
from tools.demo_words import WORDS, Source, split_words

NAME_PREFIXES = split_words("get new my fetch find run do call check quick the ask use make show")


@dataclass(frozen=True)
class Tool:
    """A family under one name and one choice of argument names."""

    family: Family
    name: str
    arguments: tuple[str, ...]

    def call(self, values: tuple[Json, ...]) -> ToolCall:
        arguments = dict(zip(self.arguments, values, strict=True))
        return {"type": "function", "function": {"name": self.name, "arguments": arguments}}


def tool_call_chat(source: Source) -> Chat:
    """Ends with the call."""
    tools = _draw_tools(source)
    messages = _opening(source)
    if source.chance(0.25):
        messages += _used(source.pick(tools), source)
    messages += _calling(source, tools)
    return _chat("tool_call", messages, tools, source)


def tool_answer_chat(source: Source) -> Chat:
    """Ends with the answer that is read off the tool's result."""
    tools = _draw_tools(source)
    messages = _opening(source)
    messages += _used(source.pick(tools), source)
    return _chat("tool_answer", messages, tools, source)


def tool_none_chat(source: Source) -> Chat:
    """Tools are listed, but the last question needs none of them."""
    tools = _draw_tools(source)
    messages = _opening(source)
    if source.chance(0.3):
        messages += _used(source.pick(tools), source)
    turn = _plain_turn(source, tools)
    messages += [user(turn.user), assistant(turn.assistant)]
    return _chat("tool_none", messages, tools, source)


def _draw_tools(source: Source) -> list[Tool]:
    families = source.rng.sample(FAMILIES, source.pick((1, 1, 1, 2, 2, 3)))
    return [_named_tool(source, family) for family in families]


def _named_tool(source: Source, family: Family) -> Tool:
    arguments = [source.pick(names) for names in family.parameters]
    if source.chance(0.1):
        arguments = source.rng.sample(WORDS, len(arguments))
    return Tool(family, _name(source, family), tuple(arguments))


def _name(source: Source, family: Family) -> str:
    """Usual names are recalled; names of unusual parts can only be read off the prompt."""
    kind = source.rng.random()
    if kind < 0.1:
        return "_".join(source.words(2))
    name = source.pick(family.names)
    return name if kind < 0.75 else f"{source.pick(NAME_PREFIXES)}_{name.split('_')[-1]}"


def _opening(source: Source) -> list[Message]:
    if source.chance(0.5):
        return []
    system = source.pick(
        ("You are a helpful assistant.", "You are Manta.", "Use the tools when they help.")
    )
    return [{"role": "system", "content": system}]


def _calling(source: Source, tools: list[Tool]) -> list[Message]:
    """A question and its call; now and then one question asks for two cities at once."""
    tool = source.pick(tools)
    use = tool.family.draw(source)
    calls = [tool.call(use.arguments)]
    question = use.question
    if tool.family.draw is draw_weather and source.chance(0.3):
        city = source.city()
        question = f"What is the weather in {use.arguments[0]} and {city}?"
        calls.append(tool.call((city,)))
    return [user(question), {"role": "assistant", "content": "", "tool_calls": calls}]


def _used(tool: Tool, source: Source) -> list[Message]:
    """A question, the call, the result and the answer."""
    uses = [tool.family.draw(source)]
    question = uses[0].question
    if tool.family.draw is draw_weather and source.chance(0.2):
        uses.append(draw_weather(source))
        question = f"What is the weather in {uses[0].arguments[0]} and {uses[1].arguments[0]}?"
    results: list[Message] = [{"role": "tool", "content": dump(use.result)} for use in uses]
    calls = [tool.call(use.arguments) for use in uses]
    return [
        user(question),
        {"role": "assistant", "content": "", "tool_calls": calls},
        *results,
        assistant(" ".join(use.answer for use in uses)),
    ]


def _plain_turn(source: Source, tools: list[Tool]) -> Turn:
    draws = [fact_turn, talk_turn, repeat_turn]
    if not any(tool.family.draw in CALCULATORS for tool in tools):
        draws.append(arithmetic_turn)
    return source.pick(draws)(source)


def _chat(task: str, messages: list[Message], tools: list[Tool], source: Source) -> Chat:
    return Chat(task, messages, [_signature(tool, source) for tool in tools])


def _signature(tool: Tool, source: Source) -> dict[str, Json]:
    """The OpenAI form; clients differ in key order and in what they leave out."""
    family = tool.family
    properties: dict[str, Json] = {}
    for name, kind in zip(tool.arguments, family.types, strict=True):
        properties[name] = {"type": kind}
        if source.chance(0.2):
            properties[name] = {"type": kind, "description": f"The {name}."}
    parameters: dict[str, Json] = {"type": "object", "properties": properties}
    if source.chance(0.9):
        parameters["required"] = list(tool.arguments)
    if source.chance(0.1):
        properties["format"] = {"type": "string"}
    description = source.pick(family.descriptions)
    function: dict[str, Json] = {
        "name": tool.name,
        "description": description,
        "parameters": parameters,
    }
    if source.chance(0.15):
        function = {"description": description, "name": tool.name, "parameters": parameters}
    if source.chance(0.1):
        return {"function": function, "type": "function"}
    return {"type": "function", "function": function}
