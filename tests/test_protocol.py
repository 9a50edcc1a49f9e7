"""Request bodies: OpenAI's fields are accepted or refused by name; errors say what is allowed."""

import json
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from engine.errors import InvalidRequestError
from serve_app.errors import ApiError
from serve_app.protocol.chat import ChatCompletionRequest
from serve_app.protocol.completions import CompletionRequest
from serve_app.protocol.parse import parse
from serve_app.protocol.sampling import MAX_STOP
from serve_app.protocol.tokenize import TokenizeRequest
from tests.bodies import (
    parse_chat,
    parse_completion,
    refusal,
    served_model,
    tokenizer,
)

# -- fields ----------------------------------------------------------------------------------


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
        (chat_create_params, ChatCompletionRequest, ChatCompletionRequest.refused),
        (completion_create_params, CompletionRequest, CompletionRequest.refused),
    ],
)
def test_every_field_of_the_openai_client_is_known(
    module: Any, model: type[ChatCompletionRequest], refused: dict[str, Any]
) -> None:
    fields = openai_fields(module)
    assert len(fields) > 15  # the client's types were found
    assert fields <= set(model.model_fields) | set(refused)
    assert not set(model.model_fields) & set(refused)


@pytest.mark.parametrize("field", ChatCompletionRequest.refused)
def test_a_refused_field_is_named(field: str) -> None:
    error = refusal(parse_chat, **{field: "anything"})
    assert (error.status, error.param, error.code) == (400, field, "unsupported")
    assert str(error).startswith(f"{field} is not supported by this server")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field, values in ChatCompletionRequest.refused.items()
        for value in (*values, None)
    ],
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
    assert (error.param, error.code) == ("stream_options.include_usages", "unknown_field")
    assert str(error).endswith("did you mean 'include_usage'?")
    error = refusal(parse_chat, messages=[{"rol": "user"}])
    assert (error.param, error.code) == ("messages[0].rol", "unknown_field")


# -- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": "1"}, "temperature", "must be a number, 0 .* to 100; got '1'"),
        ({"temperature": True}, "temperature", "must be a number"),
        ({"n": 1.0}, "n", "must be a number of choices per prompt, 1 to 128; got 1.0"),
        ({"stream": "yes"}, "stream", "must be true or false; got 'yes'"),
        ({"stop": 3}, "stop", "must be a string or a list of them; got 3"),
        ({"stop": ["a", 3]}, "stop[1]", "must be a string; got 3"),
        ({"logit_bias": [1]}, "logit_bias", "must be an object of up to 1024 token ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "must be an integer"),
        ({"logit_bias": {"1": 1, "01": 2}}, "logit_bias.01", "must be an integer"),
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
    [
        (3, "prompt"),
        ({}, "prompt"),
        ([True], "prompt"),
        (["a", 3], "prompt[1]"),
        ([1, "a"], "prompt[1]"),
        ([[1], ["a"]], "prompt[1][0]"),
        ([[1]] * 1025, "prompt"),
    ],
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


# -- what fields mean ------------------------------------------------------------------------


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
