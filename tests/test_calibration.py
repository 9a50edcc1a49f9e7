"""Calibration samples: whole windows of the text's tokens, none of them held out as well."""

import json
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from engine.errors import ConfigError
from engine.quantize.calibration import TokenSamples, samples
from engine.quantize.texts import BUILTINS, DATA, read_texts
from engine.tokenizer import Tokenizer
from tests.tiny_models import write_tokenizer
from tools.calibration_code import CODE
from tools.calibration_languages import LANGUAGES
from tools.calibration_text import FILES, render
from tools.demo_corpus import TASKS

DEMO = Path(__file__).parents[1] / "models" / "demo"


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


@cache
def oracle() -> Any:
    return PreTrainedTokenizerFast.from_pretrained(str(DEMO))


def draw(path: Path, **settings: int) -> TokenSamples:
    return samples(tokenizer(), path, **({"num_samples": 4, "seqlen": 16, "seed": 0} | settings))


def windows(tokens: list[int], seqlen: int) -> list[tuple[int, ...]]:
    starts = range(0, len(tokens) - seqlen + 1, seqlen)
    return [tuple(tokens[start : start + seqlen]) for start in starts]


def rows(tensor: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in tensor.tolist()]


def write_lines(path: Path, lines: list[object]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


def numbered(count: int) -> list[object]:
    return [f"Line {i} says that {i} is {i * i} less {i * i - i}." for i in range(count)]


def test_plain_text_is_cut_into_windows_of_its_tokens(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(map(str, numbered(200))))
    found = draw(path, num_samples=1000)
    tokens = oracle()(path.read_text() + "\n\n")["input_ids"]
    head = tokens[: len(tokens) - len(tokens) // 8]
    assert rows(found.calibration) == windows(head, 16)
    assert found.calibration.dtype == torch.int64
    assert set(rows(found.held_out.token_ids)) <= set(windows(tokens[len(head) :], 16))
    assert found.record.num_tokens == len(tokens)


def test_chats_are_rendered_by_the_models_template_with_their_tools(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    calls = [{"type": "function", "function": {"name": "clock", "arguments": {}}}]
    chat: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": "What time is it?"},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "12:30"},
        ],
        "tools": tools,
    }
    path = write_lines(tmp_path / "chats.jsonl", [chat, {"text": "And so on. " * 30}])
    found = draw(path, num_samples=1000)
    rendered = oracle().apply_chat_template(
        [message | {"content": message.get("content") or ""} for message in chat["messages"]],
        tools=tools,
        tokenize=False,
    )
    assert "clock" in rendered
    expected = oracle()(rendered)["input_ids"]
    kept = len(expected) // 16
    assert rows(found.calibration)[:kept] == windows(expected, 16)


def test_every_eighth_document_is_held_out_whatever_the_seed(tmp_path: Path) -> None:
    lines = numbered(160)
    path = write_lines(tmp_path / "lines.jsonl", lines)
    for seed in range(3):
        found = draw(path, num_samples=64, seed=seed)
        held = "\n\n".join(map(str, lines[7::8])) + "\n\n"
        assert all(tokenizer().decode(row) in held for row in found.held_out.token_ids.tolist())
    assert draw(path, seed=1).held_out.token_ids.equal(draw(path, seed=2).held_out.token_ids)


@pytest.mark.parametrize("name", ["text.txt", "lines.jsonl"])
def test_nothing_that_is_calibrated_on_is_held_out(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "text.txt":
        path.write_text(" ".join(map(str, numbered(100))))
    else:
        write_lines(path, numbered(100) * 2)
    found = draw(path, num_samples=1000)
    assert not set(rows(found.calibration)) & set(rows(found.held_out.token_ids))


def test_texts_and_the_answers_of_chats_count(tmp_path: Path) -> None:
    chats: list[object] = []
    for i in range(8):
        turns = [f"Question {i}?", f"Answer {i}.", f"And {i}?", f"That is {i}."]
        roles = ("user", "assistant") * 2
        messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]
        chats.append({"messages": messages})
    seqlen = len(oracle()(rendered(chats[7]))["input_ids"])
    found = draw(write_lines(tmp_path / "chats.jsonl", chats), seqlen=seqlen).held_out
    (ids,), (counted,) = found.token_ids.tolist(), found.counted.tolist()
    said = [token for token, count in zip(ids, counted, strict=True) if count]
    assert oracle().decode(said) == "Answer 7.<|im_end|>That is 7.<|im_end|>"
    found = draw(write_lines(tmp_path / "lines.jsonl", numbered(40))).held_out
    assert found.counted.all()


def rendered(chat: Any) -> str:
    text = oracle().apply_chat_template(chat["messages"], tokenize=False)
    assert isinstance(text, str)
    return text


def test_a_seed_draws_the_same_samples_again_and_another_seed_others(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "lines.jsonl", numbered(300))
    first = draw(path, seed=5)
    assert first.calibration.equal(draw(path, seed=5).calibration)
    assert not first.calibration.equal(draw(path, seed=6).calibration)
    assert len(set(rows(first.calibration))) == 4


def test_repeated_documents_count_once_and_the_record_says_so(tmp_path: Path) -> None:
    once = draw(write_lines(tmp_path / "once.jsonl", numbered(100)), num_samples=1000)
    twice = draw(write_lines(tmp_path / "twice.jsonl", numbered(100) * 2), num_samples=1000)
    assert once.calibration.equal(twice.calibration)
    assert once.record.num_documents == twice.record.num_documents == 100
    assert any("100 documents that repeat" in note for note in twice.record.notes)


def test_a_short_text_gives_what_it_has_and_the_record_says_so(tmp_path: Path) -> None:
    found = draw(write_lines(tmp_path / "lines.jsonl", numbered(60)), num_samples=1000)
    assert found.record.num_samples == len(found.calibration) < 1000
    notes = " ".join(found.record.notes)
    assert f"{len(found.calibration)} samples to calibrate on, 1,000 were asked for" in notes
    assert f"{len(found.held_out.token_ids)} held-out samples, 250 were wanted" in notes


def test_a_text_without_two_samples_says_how_long_it_is(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("One two three.")
    count = len(oracle()("One two three.\n\n")["input_ids"])
    with pytest.raises(ConfigError, match=f"has {count} tokens, and 32 are needed.* at most"):
        draw(path)


def test_a_tokenizer_without_a_template_joins_what_chats_say(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "chat_template"})
    )
    plain = Tokenizer.load(tmp_path)
    assert plain.chat_template is None
    chat = {"messages": [{"role": "user", "content": "Hello, " * 60 + "you."}]}
    path = write_lines(tmp_path / "chats.jsonl", [chat])
    found = samples(plain, path, num_samples=1, seqlen=16)
    assert plain.decode(found.calibration[0].tolist()) in "Hello, " * 60
    assert any("joined as text" in note for note in found.record.notes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("7", "line 2 is of type int"),
        ('{"content": "a"}', "line 2 has the keys 'content'; a line is"),
        ('{"messages": [{"content": "a"}]}', "line 2 has a message without a role"),
        ('{"messages": [{"role": "user", "content": 1}]}', "whose content is not a string"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": {}}', "not a list of objects"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'"good"\n{line}\n')
    with pytest.raises(ConfigError, match=message):
        draw(path)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"wikitext2: No such file.*nothing is downloaded"):
        draw(Path("wikitext2"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        draw(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"name the file \.jsonl"):
        draw(tmp_path / "a.json")
    (tmp_path / "a.txt").write_text("A text.")
    with pytest.raises(ConfigError, match="seqlen must be at least 2, got 1"):
        draw(tmp_path / "a.txt", seqlen=1)


def test_only_the_head_of_a_huge_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "lines.jsonl", ["a" * 40, "b" * 40, "ü" * 40])
    monkeypatch.setattr("engine.quantize.texts.MAX_BYTES", 100)  # amid a character of line 3
    texts = read_texts(path)
    assert [document.text[0] for document in texts.documents] == ["a", "b"]
    assert texts.cut
    monkeypatch.setattr("engine.quantize.texts.MAX_BYTES", path.stat().st_size)
    assert not read_texts(path).cut


@pytest.mark.parametrize("name", FILES)
def test_the_built_in_files_are_what_the_generator_writes(name: str) -> None:
    found = (DATA / name).read_text(encoding="utf-8")
    assert found == render(name), "run python -m tools.calibration_text"


def test_the_built_in_set_is_varied() -> None:
    calibration, held_out = (
        [document for name in names for document in read_texts(DATA / name).documents]
        for names in BUILTINS["builtin"]
    )
    text = "\n".join(document.joined() for document in calibration)
    assert not {document.joined() for document in calibration if not document.messages} & {
        document.joined() for document in held_out if not document.messages
    }
    assert sum(bool(document.tools) for document in calibration) > len(TASKS)
    assert sum(bool(document.messages) and not document.tools for document in calibration) > 100
    assert all(f"```{name}" in text for name in CODE if name not in ("log", "traceback"))
    assert all(f"in {name}" in text or f"into {name}" in text for name in LANGUAGES)


def test_the_built_in_set_fits_the_demo_model() -> None:
    found = samples(tokenizer(), "builtin-demo", num_samples=128, seqlen=512)
    assert found.calibration.shape == (128, 512)
    assert found.held_out.token_ids.shape == (32, 512)
    assert found.record.notes == ()


def test_the_built_in_files_are_packaged() -> None:
    root = Path(__file__).parents[1]
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    globs = settings["tool"]["setuptools"]["package-data"]["engine"]
    found = {path for pattern in globs for path in (root / "engine").glob(pattern)}
    assert {path.name for path in found} >= set(FILES)
