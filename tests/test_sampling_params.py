"""Validation of sampling parameters: every refusal names its field."""

import pickle
from typing import Any

import pytest

from engine.errors import InvalidRequestError
from engine.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("n", None),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "0.5"),
        ("temperature", True),
        ("temperature", None),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_k", True),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("seed", 2**63),
        ("seed", 1.0),
        ("min_tokens", -1),
        ("max_tokens", 0),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt_logprobs", -1),
        ("ignore_eos", 1),
        ("skip_special_tokens", None),
        ("include_stop_str_in_output", "yes"),
        ("stop", "word"),
        ("stop", [""]),
        ("stop", [3]),
        ("stop", None),
        ("stop_token_ids", 5),
        ("stop_token_ids", ["5"]),
        ("stop_token_ids", [True]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", "12"),
        ("allowed_token_ids", [1.0]),
        ("bad_words", [[]]),
        ("bad_words", [3]),
        ("bad_words", ["word"]),
        ("bad_words", "word"),
        ("logit_bias", [1]),
        ("logit_bias", {"1": 2.0}),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {1: None}),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


def test_the_message_says_what_is_allowed_and_what_came() -> None:
    with pytest.raises(ValueError, match=r"top_k must be an integer between -1 and .*, got -7"):
        SamplingParams(top_k=-7)


def test_the_defaults_and_whole_numbers_are_valid() -> None:
    assert not SamplingParams().greedy
    assert SamplingParams(temperature=0).greedy
    SamplingParams(
        top_k=-1,
        seed=-(2**63),
        logit_bias={3: -100, 4: 100.0},
        stop=("a", "b"),
        bad_words=((1, 2), [3]),
        logprobs=20,
        max_tokens=4,
        min_tokens=4,
    )


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    with pytest.raises(InvalidRequestError, match="min_tokens") as caught:
        SamplingParams(min_tokens=5, max_tokens=4)
    assert caught.value.param == "min_tokens"


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": {100: 1.0}},
        {"stop_token_ids": [-1]},
        {"allowed_token_ids": [0, 100]},
        {"bad_words": [[1], [2, 100]]},
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"ids 0 to 99") as caught:
        SamplingParams(**params).validate_vocab(100)
    assert caught.value.param in params


def test_params_travel_between_processes() -> None:
    params = SamplingParams(logit_bias={1: 2.0}, stop=["x"], seed=3)
    assert pickle.loads(pickle.dumps(params)) == params
