"""Request bodies: OpenAI's fields are accepted or refused by name; errors say what is allowed."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any, cast

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from engine.errors import InvalidRequestError
from engine.outputs import TokenLogprobs
from engine.tokenizer import Tokenizer
from serve_app.api import chat as chat_api
from serve_app.api import completions as completions_api
from serve_app.errors import ApiError
from serve_app.protocol.chat import ChatCompletionRequest
from serve_app.protocol.completions import CompletionRequest
from serve_app.protocol.logprobs import (
    CompletionLogprobsBuilder,
    chat_logprobs,
    prompt_logprobs,
)
from serve_app.protocol.messages import to_template
from serve_app.protocol.parse import parse
from serve_app.protocol.sampling import MAX_STOP
from serve_app.protocol.tokenize import TokenizeRequest
from serve_app.served_model import ServedModel
from tests.tiny_tokenizers import write_byte_fallback, write_byte_level

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "tiny", "prompt": "Hi"}


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(write_byte_level(Path(mkdtemp())))


def served_model(**defaults: float) -> ServedModel:
    """As much of a ServedModel as sampling parameters are made from."""
    stub = SimpleNamespace(
        tokenizer=SimpleNamespace(sampling_defaults=defaults, encode=tokenizer().encode),
        info=SimpleNamespace(vocab_size=300),
    )
    return cast(ServedModel, stub)


def parse_chat(**fields: Any) -> ChatCompletionRequest:
    return parse(ChatCompletionRequest, json.dumps(CHAT | fields).encode(), chat_api.REFUSED)


def parse_completion(**fields: Any) -> CompletionRequest:
    body = json.dumps(COMPLETION | fields).encode()
    return parse(CompletionRequest, body, completions_api.REFUSED)


def refusal(function: Any, *args: Any, **kwargs: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        function(*args, **kwargs)
    return caught.value


# -- fields ---------------------------------------------------------------------------------


def openai_fields(module: Any) -> set[str]:
    return {
        field
        for name, params in vars(module).items()
        if name.startswith("CompletionCreateParams") and hasattr(params, "__annotations__")
        for field in params.__annotations__
    }


@pytest.mark.parametrize(
    ("module", "model", "refused"),
    [
        (chat_create_params, ChatCompletionRequest, chat_api.REFUSED),
        (completion_create_params, CompletionRequest, completions_api.REFUSED),
    ],
)
def test_every_field_of_the_openai_client_is_known(
    module: Any, model: type[ChatCompletionRequest], refused: dict[str, Any]
) -> None:
    fields = openai_fields(module)
    assert len(fields) > 15  # the client's types were found
    assert fields <= set(model.model_fields) | set(refused)
    assert not set(model.model_fields) & set(refused)


@pytest.mark.parametrize("field", chat_api.REFUSED)
def test_a_refused_field_is_named(field: str) -> None:
    error = refusal(parse_chat, **{field: "anything"})
    assert (error.status, error.param, error.code) == (400, field, "unsupported")
    assert str(error).startswith(f"{field} is not supported by this server")


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in chat_api.REFUSED.items() for value in (*values, None)],
)
def test_a_refused_field_may_ask_for_nothing(field: str, value: Any) -> None:
    parse_chat(**{field: value})


def test_neutral_values_are_compared_with_their_type() -> None:
    assert refusal(parse_completion, best_of=True).param == "best_of"
    assert refusal(parse_chat, store=0).param == "store"
    parse_completion(best_of=1, suffix="")


@pytest.mark.parametrize(
    ("field", "hint"),
    [("temprature", "did you mean 'temperature'?"), ("toolz", "did you mean 'tools'?")],
)
def test_an_unknown_field_is_refused_with_the_nearest(field: str, hint: str) -> None:
    error = refusal(parse_chat, **{field: 1})
    assert (error.status, error.param, error.code) == (400, field, "unknown_field")
    assert str(error).endswith(hint)
    assert str(refusal(parse_chat, xyzzy=1)) == "unknown field 'xyzzy'"


def test_unknown_fields_inside_a_field_are_refused() -> None:
    error = refusal(parse_chat, stream_options={"include_usages": True})
    assert error.param == "stream_options.include_usages"


# -- values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": "1"}, "temperature", "must be a number, 0 .* to 100; got '1'"),
        ({"temperature": True}, "temperature", "must be a number"),
        ({"n": 1.0}, "n", "must be a number of choices per prompt, 1 to 128; got 1.0"),
        ({"stream": "yes"}, "stream", "must be true or false; got 'yes'"),
        ({"stop": 3}, "stop", "must be a string or a list of them; got 3"),
        ({"stop": ["a", 3]}, "stop[1]", "must be a string; got 3"),
        ({"logit_bias": [1]}, "logit_bias", "must be an object of token ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "must be an integer"),
        ({"messages": "Hi"}, "messages", "must be a list of messages, at least one; got 'Hi'"),
        ({"messages": [{}]}, "messages[0].role", "is missing"),
        ({"messages": [{"role": "bot"}]}, "messages[0].role", "must be 'system', .* got 'bot'"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "got 1"),
        ({"model": None}, "model", "the name of the served model"),
        ({"user": "x" * 99, "seed": "x" * 99}, "seed", "got 'x{59}…$"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(
    fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        parse_chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("prompt", "param"),
    [(3, "prompt"), (["a", 3], "prompt[1]"), ([[1], ["a"]], "prompt[1][0]"), ({}, "prompt")],
)
def test_a_wrong_prompt_is_named(prompt: Any, param: str) -> None:
    assert refusal(parse_completion, prompt=prompt).param == param


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])],
)
def test_prompts_come_in_four_shapes(prompt: Any, prompts: list[Any]) -> None:
    assert parse_completion(prompt=prompt).prompt_list() == prompts


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"model": ', "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"", "not valid JSON"),
        (b'{"model": "tiny", "messages": [], "top_p": NaN}', "top_p must be"),
        (b'\xff{"model": "tiny"}', "not valid JSON"),
    ],
)
def test_a_bad_body_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(ApiError, match=message):
        parse(ChatCompletionRequest, body)


# -- what fields mean -----------------------------------------------------------------------


def test_request_values_win_over_the_checkpoints_defaults() -> None:
    model = served_model(temperature=0.6, top_k=20, max_tokens=100)
    request = parse_chat(temperature=0.0, seed=7, logit_bias={"3": -100})
    params = request.sampling_params(model, max_tokens=None, logprobs=None)
    assert (params.temperature, params.top_k, params.max_tokens, params.seed) == (0.0, 20, 100, 7)
    assert params.logit_bias == {3: -100.0}
    params = parse_chat().sampling_params(served_model(), max_tokens=None, logprobs=2)
    assert (params.temperature, params.max_tokens, params.logprobs) == (1.0, None, 2)


def test_a_default_yields_to_min_tokens() -> None:
    request = parse_chat(min_tokens=50)
    params = request.sampling_params(served_model(max_tokens=20), max_tokens=None, logprobs=None)
    assert params.max_tokens == 50
    with pytest.raises(InvalidRequestError, match="min_tokens"):
        request.sampling_params(served_model(), max_tokens=20, logprobs=None)


def test_bad_words_are_banned_with_and_without_a_space() -> None:
    request = parse_chat(bad_words=["fox"])
    params = request.sampling_params(served_model(), max_tokens=None, logprobs=None)
    assert {tokenizer().decode(word) for word in params.bad_words} == {"fox", " fox"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": ["x"] * (MAX_STOP + 1)}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"bad_words": ["x"] * 1025}, "bad_words"),
    ],
)
def test_lists_that_cost_time_per_token_are_bounded(fields: dict[str, Any], param: str) -> None:
    request = parse_chat(**fields)
    error = refusal(request.sampling_params, served_model(), max_tokens=None, logprobs=None)
    assert error.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"n": 0},
        {"stop": ""},
        {"stop_token_ids": [300]},
        {"allowed_token_ids": []},
        {"bad_words": [""]},
        {"prompt_logprobs": 21},
    ],
)
def test_values_out_of_range_name_their_field(fields: dict[str, Any]) -> None:
    request = parse_chat(**fields)
    with pytest.raises(InvalidRequestError) as caught:
        request.sampling_params(served_model(), max_tokens=None, logprobs=None)
    assert caught.value.param == next(iter(fields))


def test_fields_that_contradict_each_other_are_refused() -> None:
    assert refusal(parse_chat(max_tokens=1, max_completion_tokens=2).token_limit).status == 400
    assert refusal(parse_chat(top_logprobs=2).num_logprobs).param == "top_logprobs"
    streamed = parse_chat(stream=True, prompt_logprobs=1)
    assert refusal(streamed.check_stream_options).param == "prompt_logprobs"
    not_streamed = parse_chat(stream_options={"include_usage": True})
    assert refusal(not_streamed.check_stream_options).param == "stream_options"
    padded = parse_chat(stream=True, stream_options={"include_obfuscation": True})
    assert refusal(padded.check_stream_options).code == "unsupported"
    both = parse_chat(continue_final_message=True, add_generation_prompt=True)
    assert refusal(lambda: both.opens_answer).param == "add_generation_prompt"
    assert refusal(parse_chat(truncate_prompt_tokens=0).truncate, [1]).status == 400


def test_newer_and_older_names_of_the_token_limit_are_one() -> None:
    assert parse_chat(max_tokens=3).token_limit() == 3
    assert parse_chat(max_completion_tokens=4).token_limit() == 4
    assert parse_chat().token_limit() is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": []}, "prompt"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"messages": [], "add_special_tokens": True}, "add_special_tokens"),
    ],
)
def test_tokenize_takes_a_prompt_or_messages(body: dict[str, Any], param: str) -> None:
    request = parse(TokenizeRequest, json.dumps(body).encode())
    assert refusal(request.check).param == param


# -- messages -------------------------------------------------------------------------------


class Template(SimpleNamespace):
    """A chat template that knows these words."""

    def mentions(self, word: str) -> bool:
        return word in self.words


def convert(*messages: dict[str, Any], words: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    template: Any = Template(words=words)
    return to_template(parse_chat(messages=list(messages)).messages, template)


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert convert({"role": "user", "content": parts}) == [{"role": "user", "content": "a\nb"}]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_id": "1"}},
    ],
)
def test_other_parts_are_refused_by_name(part: dict[str, Any]) -> None:
    error = refusal(convert, {"role": "user", "content": [{"type": "text", "text": "a"}, part]})
    assert (error.param, error.code) == ("messages[0].content[1].type", "unsupported")
    assert part["type"] in str(error)


def test_developer_messages_are_system_messages_to_templates_that_do_not_know_them() -> None:
    message = {"role": "developer", "content": "a"}
    assert convert(message)[0]["role"] == "system"
    assert convert(message, words=("developer",))[0]["role"] == "developer"


def test_tool_calls_reach_a_template_that_knows_them() -> None:
    words = ("tool", "tool_calls")
    answer = {"role": "tool", "tool_call_id": "1", "content": "2"}
    converted = convert({"role": "assistant", "tool_calls": [CALL]}, answer, words=words)
    assert converted[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert converted[1] == {"role": "tool", "tool_call_id": "1", "content": "2"}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "tool_calls": [CALL]}, "messages[0].tool_calls"),
        ({"role": "tool", "tool_call_id": "1", "content": "2"}, "messages[0].role"),
        ({"role": "user", "content": "a", "name": "Ada"}, "messages[0].name"),
        ({"role": "assistant", "content": "a", "refusal": "no"}, "messages[0].refusal"),
        ({"role": "user", "content": "a", "tool_call_id": "1"}, "messages[0].tool_call_id"),
        ({"role": "user", "tool_calls": [CALL]}, "messages[0].tool_calls"),
        ({"role": "user"}, "messages[0].content"),
    ],
)
def test_what_a_template_would_drop_is_refused(message: dict[str, Any], param: str) -> None:
    assert refusal(convert, message).param == param


def test_arguments_of_a_tool_call_must_be_json() -> None:
    call = CALL | {"function": {"name": "f", "arguments": "{"}}
    message = {"role": "assistant", "tool_calls": [call]}
    error = refusal(convert, message, words=("tool_calls",))
    assert error.param == "messages[0].tool_calls[0].function.arguments"


# -- log probabilities ----------------------------------------------------------------------


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
