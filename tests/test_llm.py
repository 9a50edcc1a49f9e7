"""Offline use: prompts in any form, text and tokens out, faults named."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine import LLM, SamplingParams
from engine.errors import ConfigError, InvalidRequestError
from tests.tiny_models import TinyModel, write_servable_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_servable_model("llama", tmp_path_factory.mktemp("llm") / "model")


@pytest.fixture(scope="module")
def llm(tiny: TinyModel) -> Iterator[LLM]:
    llm = LLM(str(tiny.path), dtype="float32", num_threads=1, cache_max_entry_count=64)
    yield llm
    llm.close()


def reference(tiny: TinyModel, prompt: list[int], count: int = 12) -> list[int]:
    with torch.inference_mode():
        output = tiny.reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def test_prompts_come_as_text_texts_or_token_ids(llm: LLM, tiny: TinyModel) -> None:
    texts = ["The quick brown fox", "What is"]
    ids = [llm.tokenizer.encode(text) for text in texts]
    by_text = llm.generate(texts, GREEDY, use_tqdm=False)
    by_ids = llm.generate(ids, GREEDY, use_tqdm=False)
    single = llm.generate(texts[0], GREEDY, use_tqdm=False)
    assert [r.prompt for r in by_text] == texts
    assert [r.prompt for r in by_ids] == [None, None]
    for one, two, prompt in zip(by_text, by_ids, ids, strict=True):
        assert one.prompt_token_ids == two.prompt_token_ids == prompt
        assert one.outputs[0].token_ids == two.outputs[0].token_ids == reference(tiny, prompt)
        assert one.outputs[0].text == llm.tokenizer.decode(one.outputs[0].token_ids)
        assert one.outputs[0].finish_reason == "length"
    assert single[0].outputs[0].token_ids == by_text[0].outputs[0].token_ids


def test_outputs_keep_the_order_of_prompts(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (9, 1, 5)]
    outputs = llm.generate([[5], [6], [7]], params, use_tqdm=False)
    assert [len(r.outputs[0].token_ids) for r in outputs] == [9, 1, 5]
    assert [r.prompt_token_ids for r in outputs] == [[5], [6], [7]]


def test_n_gives_different_seeded_completions(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=8, ignore_eos=True)
    first = llm.generate([[9, 8, 7]], params, use_tqdm=False)[0]
    again = llm.generate([[9, 8, 7]], params, use_tqdm=False)[0]
    tokens = [completion.token_ids for completion in first.outputs]
    assert len({tuple(each) for each in tokens}) == 3
    assert tokens == [completion.token_ids for completion in again.outputs]
    assert [completion.index for completion in first.outputs] == [0, 1, 2]


def test_a_stop_string_ends_a_completion(llm: LLM) -> None:
    full = llm.generate("The", GREEDY, use_tqdm=False)[0].outputs[0]
    stop = full.text[3:6]
    for include in (False, True):
        params = SamplingParams(
            temperature=0,
            max_tokens=12,
            ignore_eos=True,
            stop=[stop],
            include_stop_str_in_output=include,
        )
        completion = llm.generate("The", params, use_tqdm=False)[0].outputs[0]
        at = full.text.index(stop)
        assert completion.text == full.text[: at + len(stop) if include else at]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        assert completion.token_ids == full.token_ids[: len(completion.token_ids)]


def test_logprobs_come_per_token(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=0)
    output = llm.generate([[5, 6, 7]], params, use_tqdm=False)[0]
    completion = output.outputs[0]
    assert completion.logprobs is not None
    assert [entry.token_id for entry in completion.logprobs] == completion.token_ids
    assert output.prompt_logprobs is not None
    assert [e and e.token_id for e in output.prompt_logprobs] == [None, 6, 7]


def test_chat_renders_the_template_and_streams_the_same_text(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    answer = llm.chat(messages, GREEDY, use_tqdm=False)[0]
    assert answer.prompt_token_ids == llm.tokenizer.render_chat(messages)
    pieces = list(llm.stream_chat(messages, GREEDY))
    assert "".join(pieces) == answer.outputs[0].text
    both = llm.chat([messages, messages], GREEDY, use_tqdm=False)
    assert [r.outputs[0].text for r in both] == [answer.outputs[0].text] * 2


def test_a_closed_stream_leaves_nothing_running(llm: LLM) -> None:
    stream = llm.stream_chat([{"role": "user", "content": "Hi"}], GREEDY)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not llm._engine.has_work


def test_faults_are_named_and_leave_nothing_running(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="token id 99999"):
        llm.generate([[1], [99999]], GREEDY, use_tqdm=False)
    assert not llm._engine.has_work
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.generate([[]], GREEDY, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match=r"prompts\[0\] is 1"):
        llm.generate([1, 2], GREEDY, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="1 for 2 prompts"):
        llm.generate([[1], [2]], [GREEDY], use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="messages is empty"):
        llm.chat([], GREEDY)
    with pytest.raises(ConfigError, match="tp=2"):
        LLM(str(tmp_path), tp=2)
    with pytest.raises(ConfigError, match="manta serve --tp 1 --pp 2"):
        LLM(str(tmp_path), pp=2)
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        LLM(str(tmp_path), max_num_seq=3)
