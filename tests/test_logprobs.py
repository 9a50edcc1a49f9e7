"""Log probabilities in the shapes of OpenAI and vLLM."""

import json
from pathlib import Path

from engine.outputs import TokenLogprobs
from engine.tokenizer import Tokenizer
from serve_app.protocol.logprobs import (
    CompletionLogprobsBuilder,
    chat_logprobs,
    prompt_logprobs,
)
from tests.bodies import (
    tokenizer,
)
from tests.tiny_tokenizers import write_byte_fallback


def scored(*token_ids: int) -> list[TokenLogprobs]:
    """Each token as the second likeliest, after token 3."""
    return [TokenLogprobs(i, -2.0, 2, [3], [-0.5]) for i in token_ids]


def test_offsets_count_characters_whatever_the_token_borders() -> None:
    text = "déjà 🙂."
    token_ids = tokenizer().encode(text)
    builder = CompletionLogprobsBuilder(tokenizer(), skip_special_tokens=True)
    halves = [token_ids[:3], [1, *token_ids[3:]]]  # a hidden special token in between
    for half in halves:
        built = builder.build(half, scored(*half))
        for name, offset in zip(built.tokens, built.text_offset, strict=True):
            if not name.startswith("bytes:") and name != "<|im_start|>":
                assert text[offset:].startswith(name)


def test_parts_of_characters_are_named_by_their_bytes() -> None:
    token_ids = [i for i in tokenizer().encode("🙂") if "\ufffd" in tokenizer().token_text(i)]
    built = CompletionLogprobsBuilder(tokenizer(), True).build(token_ids, scored(*token_ids))
    assert all(name.startswith("bytes:\\x") for name in built.tokens)
    content = chat_logprobs(tokenizer(), scored(*token_ids)).content
    assert bytes(b for entry in content for b in entry.bytes) == b"".join(
        map(tokenizer().token_bytes, token_ids)
    )


def test_impossible_tokens_have_a_finite_log_probability() -> None:
    entry = TokenLogprobs(5, float("-inf"), 300, [3], [float("-inf")])
    content = chat_logprobs(tokenizer(), [entry]).content[0]
    assert (content.logprob, content.top_logprobs[0].logprob) == (-9999.0, -9999.0)
    built = CompletionLogprobsBuilder(tokenizer(), True).build([4, 5], [None, entry])
    assert built.token_logprobs == [None, -9999.0]
    json.loads(built.model_dump_json())


def test_prompt_logprobs_hold_the_token_and_its_rivals() -> None:
    first, second = prompt_logprobs(tokenizer(), [None, *scored(5)])
    assert first is None
    assert second is not None
    assert {i: (p.logprob, p.rank) for i, p in second.items()} == {3: (-0.5, 1), 5: (-2.0, 2)}


def test_special_pieces_of_sentencepiece_are_bytes_and_spaces(tmp_path: Path) -> None:
    loaded = Tokenizer.load(write_byte_fallback(tmp_path))
    token_ids = loaded.encode("a 你")
    assert b"".join(map(loaded.token_bytes, token_ids)) == " a 你".encode()
