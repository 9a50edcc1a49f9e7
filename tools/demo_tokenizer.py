"""The demo tokenizer: byte-level BPE trained on the corpus, with the ChatML template.

The template follows Qwen2.5's: Hermes tool calls, tool results inside user turns. Unlike Qwen's it
adds no default system message, and takes `arguments` as an object or as the OpenAI JSON string.
"""

import json
import re
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.demo_chat import TOOLS_FOOTER, TOOLS_HEADER, Chat, render
from tools.demo_corpus import sample_chat
from tools.demo_words import Source

# A multiple of 64, so that the embedding splits over ranks and fits the kernels' tiles.
VOCAB_SIZE = 2048
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PAD_ID, START_ID, END_ID = 0, 1, 2
# Single tokens, but not special: a server has to see them in the decoded text to find a call.
CALL_MARKS = ("<tool_call>", "</tool_call>")

_TRAINING_CHATS = 20_000

CHAT_TEMPLATE = (
    (
        """{%- set has_system = messages and messages[0].role == 'system' %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if has_system and messages[0].content %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- HEADER }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- FOOTER + '<|im_end|>\\n' }}
{%- elif has_system and messages[0].content %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if message.content or not loop.first %}
                {{- '\\n' }}
            {%- endif %}
            {%- set function = tool_call.function or tool_call %}
            {{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
            {%- if function.arguments is string %}
                {{- function.arguments }}
            {%- else %}
                {{- function.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
    )
    .replace("HEADER", json.dumps(TOOLS_HEADER))
    .replace("FOOTER", json.dumps(TOOLS_FOOTER))
)


def train_tokenizer(seed: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # Digits stand alone because sums and counts are learnt digit by digit; capitalised words lose
    # their space, so that a name has the same tokens after a space as after a quotation mark.
    apart = pre_tokenizers.Split(Regex(r"\d|\p{Lu}+\p{Ll}*"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [apart, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CALL_MARKS),
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    source = Source(Random(f"tokenizer {seed}"))
    tokenizer.train_from_iterator(
        (_plain_text(sample_chat(source)) for _ in range(_TRAINING_CHATS)), trainer
    )
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in CALL_MARKS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [START],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode_chat(tokenizer: Tokenizer, chat: Chat) -> tuple[list[int], list[bool]]:
    """Token ids, and for each whether the assistant wrote it."""
    ids: list[int] = []
    by_assistant: list[bool] = []
    for segment in render(chat):
        tokens = tokenizer.encode(segment.text, add_special_tokens=False).ids
        ids += tokens
        by_assistant += [segment.by_assistant] * len(tokens)
    return ids, by_assistant


def encode_prompt(tokenizer: Tokenizer, chat: Chat) -> list[int]:
    """What the model reads before it writes the last message."""
    ids, by_assistant = encode_chat(tokenizer, chat)
    end = len(ids)
    while not by_assistant[end - 1]:
        end -= 1
    while by_assistant[end - 1]:
        end -= 1
    return ids[:end]


def _plain_text(chat: Chat) -> str:
    """Text without the tokens that are added as a whole, lest their letters be merged."""
    text = "".join(segment.text for segment in render(chat))
    return re.sub("|".join(map(re.escape, (START, END, *CALL_MARKS))), " ", text)
