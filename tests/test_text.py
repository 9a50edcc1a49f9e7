"""Text in and out: whatever the token borders, the pieces join to what one decode gives."""

import itertools
import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import CheckpointError, InvalidRequestError
from engine.sampling_params import SamplingParams
from engine.text import TextStream
from engine.tokenizer import Tokenizer
from tests.tiny_tokenizers import write_byte_fallback, write_byte_level

KINDS = ("byte_level", "byte_fallback")
WRITERS = {"byte_level": write_byte_level, "byte_fallback": write_byte_fallback}
HELLO = [{"role": "user", "content": "Hello"}]


@cache
def directory(kind: str) -> Path:
    return WRITERS[kind](Path(mkdtemp(prefix=kind)))


@cache
def tokenizer(kind: str) -> Tokenizer:
    return Tokenizer.load(directory(kind))


@cache
def oracle(kind: str) -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(directory(kind))


def split(token_ids: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Cut into chunks of the given sizes, which repeat."""
    chunks: list[list[int]] = []
    rest = list(token_ids)
    for size in itertools.cycle(sizes):
        if not rest:
            return chunks
        chunks.append(rest[:size])
        rest = rest[size:]
    raise AssertionError


def stream(
    kind: str, chunks: Sequence[Sequence[int]], params: SamplingParams, prompt: Sequence[int] = ()
) -> tuple[list[str], int, str | None]:
    """Pieces, counted tokens and the stop string of a whole sequence."""
    text = TextStream(tokenizer(kind), params, prompt)
    pieces: list[str] = []
    num_tokens = 0
    for index, chunk in enumerate(chunks):
        delta = text.push(chunk, finished=index == len(chunks) - 1)
        pieces.append(delta.text)
        num_tokens += delta.num_tokens
        if delta.stop is not None:
            return pieces, num_tokens, delta.stop
    return pieces, num_tokens, None


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)
BYTE_LEVEL_IDS = st.lists(st.integers(0, 299), max_size=60)
# Whole characters between the tokens that are cut anywhere: 1 to 4 bytes of UTF-8.
TEXTS = st.text(st.sampled_from("ab zé你🙂\n.") | st.characters(codec="utf-8"), max_size=40)


@given(BYTE_LEVEL_IDS, SIZES, st.booleans())
def test_pieces_join_to_one_decode_of_any_ids(
    token_ids: list[int], sizes: list[int], skip_special_tokens: bool
) -> None:
    params = SamplingParams(skip_special_tokens=skip_special_tokens)
    pieces, num_tokens, _ = stream("byte_level", split(token_ids, sizes), params)
    expected = oracle("byte_level").decode(token_ids, skip_special_tokens=skip_special_tokens)
    assert "".join(pieces) == expected
    assert num_tokens == len(token_ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, prompt=TEXTS, sizes=SIZES)
def test_pieces_continue_the_prompt_and_are_whole_characters(
    kind: str, text: str, prompt: str, sizes: list[int]
) -> None:
    encode = tokenizer(kind).encode
    prompt_ids, token_ids = encode(prompt), encode(text)
    pieces, _, _ = stream(kind, split(token_ids, sizes), SamplingParams(), prompt_ids)
    before = oracle(kind).decode(prompt_ids, skip_special_tokens=True)
    after = oracle(kind).decode(prompt_ids + token_ids, skip_special_tokens=True)
    assert before + "".join(pieces) == after
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@given(count=st.integers(65, 400), sizes=SIZES)
def test_bytes_that_never_become_characters_do_not_pile_up(
    kind: str, count: int, sizes: list[int]
) -> None:
    continuation = tokenizer(kind).encode("é")[-1:]
    text = TextStream(tokenizer(kind), SamplingParams())
    pieces = [text.push(chunk).text for chunk in split(continuation * count, sizes)]
    assert len("".join(pieces)) >= count - 70  # the rest is a window's worth


STOPS = st.lists(st.text(st.sampled_from("ab é"), min_size=1, max_size=4), min_size=1, max_size=3)
STOPPED_TEXTS = st.text(st.sampled_from("ab é"), max_size=30)


def first_end(text: str, stops: Sequence[str]) -> tuple[int, int, str] | None:
    """End, start and string of the stop that ends first; the longest of those."""
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    return min(found, default=None)


@given(STOPPED_TEXTS, STOPS, SIZES, st.booleans())
def test_a_stop_string_cuts_where_it_first_completes(
    text: str, stops: list[str], sizes: list[int], include: bool
) -> None:
    token_ids = tokenizer("byte_level").encode(text)
    params = SamplingParams(stop=stops, include_stop_str_in_output=include)
    pieces, num_tokens, stop = stream("byte_level", split(token_ids, sizes), params)
    cut = first_end(text, stops)
    if cut is None:
        assert ("".join(pieces), num_tokens, stop) == (text, len(token_ids), None)
        return
    end, start, expected = cut
    assert stop == expected
    assert "".join(pieces) == text[: end if include else start]
    before = tokenizer("byte_level").decode(token_ids[: num_tokens - 1])
    assert first_end(before.rstrip("\ufffd"), stops) is None  # it ended with the last token
    assert expected in tokenizer("byte_level").decode(token_ids[:num_tokens])


@given(STOPPED_TEXTS, STOPS)
def test_no_more_is_held_back_than_could_begin_a_stop_string(text: str, stops: list[str]) -> None:
    params = SamplingParams(stop=stops)
    flow = TextStream(tokenizer("byte_level"), params)
    token_ids = tokenizer("byte_level").encode(text)
    shown = ""
    for index, token_id in enumerate(token_ids):
        delta = flow.push([token_id])
        shown += delta.text
        if delta.stop is not None:
            return
        known = tokenizer("byte_level").decode(token_ids[: index + 1]).rstrip("\ufffd")
        held = known.removeprefix(shown)
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_within_min_tokens_is_text() -> None:
    token_ids = tokenizer("byte_level").encode("a. b. c. d.")
    params = SamplingParams(stop=["."], min_tokens=4, max_tokens=99)
    pieces, num_tokens, stop = stream("byte_level", [token_ids], params)
    text = "".join(pieces)
    assert stop == "."
    assert num_tokens > 4
    assert "." in text
    assert not text.endswith(".")


@pytest.mark.parametrize(("include", "expected"), [(False, "Hi"), (True, "Hi<|im_end|>")])
def test_the_token_that_ends_a_sequence_is_shown_only_on_request(
    include: bool, expected: str
) -> None:
    params = SamplingParams(include_stop_str_in_output=include, skip_special_tokens=False)
    flow = TextStream(tokenizer("byte_level"), params)
    delta = flow.push([*tokenizer("byte_level").encode("Hi"), 2], finished=True, stop_token_id=2)
    assert delta.text == expected
    assert delta.num_tokens == len(tokenizer("byte_level").encode("Hi")) + 1


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_bytes_of_tokens_join_to_the_text(kind: str, text: str) -> None:
    token_ids = tokenizer(kind).encode(text)
    joined = b"".join(map(tokenizer(kind).token_bytes, token_ids)).decode()
    if kind == "byte_fallback":  # its own ▁ is a space, and it begins a text with one
        text = f" {text}".replace("▁", " ") if text else ""
    assert joined == text


def test_tokens_outside_the_vocabulary_are_empty() -> None:
    assert tokenizer("byte_level").token_bytes(10_000) == b""
    assert tokenizer("byte_level").decode([10_000]) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_chats_are_encoded_as_transformers_does(kind: str) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "é?"}]
    expected = oracle(kind).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert tokenizer(kind).render_chat(messages) == expected
    continued = oracle(kind).apply_chat_template(
        messages[:2], continue_final_message=True, return_dict=False
    )
    ours = tokenizer(kind).render_chat(
        messages[:2], add_generation_prompt=False, continue_final_message=True
    )
    assert ours == continued


def test_a_template_variable_has_an_effect_or_is_refused() -> None:
    render = tokenizer("byte_fallback").render_chat
    assert render(HELLO, chat_template_kwargs={"shout": "!"}) == [
        *render(HELLO)[:-1],
        *tokenizer("byte_fallback").encode(" !", add_special_tokens=False)[1:],
    ]
    for name in ("whisper", "messages", "chat_template", "tokenize"):
        with pytest.raises(InvalidRequestError, match="it has: shout"):
            render(HELLO, chat_template_kwargs={name: "x"})


def test_what_a_template_refuses_is_the_requests_fault() -> None:
    system = [{"role": "system", "content": "Be brief."}, *HELLO]
    with pytest.raises(InvalidRequestError, match="only user and assistant roles") as refusal:
        tokenizer("byte_fallback").render_chat(system)
    assert refusal.value.param == "messages"
    with pytest.raises(InvalidRequestError, match="refuses the messages"):
        tokenizer("byte_fallback").render_chat([])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy a test may change."""
    shutil.copytree(directory("byte_level"), tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_without_a_template_chats_are_refused(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(InvalidRequestError, match="no chat template"):
        Tokenizer.load(checkpoint).render_chat(HELLO)


def test_a_broken_template_is_the_checkpoints_fault(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(CheckpointError, match="chat template is not valid"):
        Tokenizer.load(checkpoint)


def test_eos_and_defaults_come_from_generation_config(checkpoint: Path) -> None:
    values = {"eos_token_id": [0, 2], "temperature": 0.6, "top_k": 20, "do_sample": True}
    (checkpoint / "generation_config.json").write_text(json.dumps(values))
    loaded = Tokenizer.load(checkpoint)
    assert loaded.eos_token_ids == (0, 2)
    assert dict(loaded.sampling_defaults) == {"temperature": 0.6, "top_k": 20}


def test_a_checkpoint_may_ask_for_no_sampling(checkpoint: Path) -> None:
    values = {"do_sample": False, "temperature": 0.6}
    (checkpoint / "generation_config.json").write_text(json.dumps(values))
    assert dict(Tokenizer.load(checkpoint).sampling_defaults) == {"temperature": 0.0}


def test_eos_is_read_from_config_where_there_is_no_generation_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 7}))
    assert Tokenizer.load(checkpoint).eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ("[]", "must hold a JSON object"),
        ('{"temperature": "hot"}', "temperature must be a number, found 'hot'"),
        ('{"eos_token_id": "</s>"}', "eos_token_id must be a token id"),
    ],
)
def test_a_bad_generation_config_is_named(checkpoint: Path, text: str, message: str) -> None:
    (checkpoint / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(checkpoint)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"Add its tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_checkpoints_own_code_is_never_run(checkpoint: Path) -> None:
    path = checkpoint / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values["tokenizer_class"] = "OwnTokenizer"
    values["auto_map"] = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    path.write_text(json.dumps(values))
    (checkpoint / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CheckpointError, match="without remote code"):
        Tokenizer.load(checkpoint)
