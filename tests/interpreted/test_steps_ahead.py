"""Whatever comes, goes and is preempted, a GPU's engine one step ahead draws what a quiet one does.

All of the engine but the layers: step tensors, token pool, padding and sampler are those of a GPU.
In place of the decoder stands a model whose keys are the tokens themselves, so that a key that was
overwritten, or read where it never was, changes every token from there on.
"""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_cache import KVCache
from engine.local_executor import LocalExecutor
from engine.models.decoder import Decoder
from engine.models.rope import DefaultRope
from engine.models.spec import DecoderSpec
from engine.outputs import SequenceOutput
from engine.parallel import ParallelGroup
from engine.rank_model import RankModel
from engine.sampling_params import SamplingParams
from engine.sequence import EngineRequest
from kernels.gpu.step import GpuStep
from kernels.rope import RotaryTable

VOCAB = 61
BLOCK_SIZE = 16
SESSION_LEN = 64
EOS = 7
SPEC = DecoderSpec(
    architecture="history",
    vocab_size=VOCAB,
    hidden_size=1,
    intermediate_size=1,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=1,
    max_position_embeddings=SESSION_LEN,
    rms_norm_eps=1e-5,
    rope=DefaultRope(theta=1e4),
    windows=(None,),
)


class HistoryDecoder(Decoder):
    """Hidden states are hashes of all tokens so far, as the cache has them."""

    def forward(self, inputs: Tensor, positions: Tensor, meta: Any, kv_cache: KVCache) -> Tensor:
        assert isinstance(meta, GpuStep)
        (layer,) = kv_cache.layers
        assert isinstance(layer, Tensor)
        keys = layer[:, 0, :, 0]  # [num_blocks, block_size], float32 holds each token exactly
        stored = meta.slot_mapping >= 0
        slots = meta.slot_mapping[stored]
        keys[slots // BLOCK_SIZE, slots % BLOCK_SIZE] = inputs[stored].float()
        hidden = torch.zeros(len(inputs), 1)
        starts = meta.query_start_loc.tolist()
        for seq, (row, length) in enumerate(
            zip(meta.rows.tolist(), meta.context_lens.tolist(), strict=True)
        ):
            if length == 0:  # padding
                continue
            tokens = keys[meta.block_tables[row].long()].reshape(-1)[:length].long().tolist()
            assert positions[starts[seq + 1] - 1] == length - 1
            value, hashes = 17, []
            for token_id in tokens:
                value = (value * 31 + token_id + 7) % 65_521
                hashes.append(float(value))
            first, last = starts[seq], starts[seq + 1]
            hidden[first:last, 0] = torch.tensor(hashes[length - (last - first) :])
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        places = torch.arange(1, VOCAB + 1)
        return (hidden.long() * places % 9_973).float() / 1_500


def load(config: EngineConfig, group: ParallelGroup, device: str, peers: object) -> RankModel:
    empty = torch.zeros(0)
    decoder = HistoryDecoder(None, (empty,), None, None, RotaryTable(empty, empty), 0.0)  # type: ignore[arg-type]
    return RankModel(
        config=config,
        group=group,
        device=device,
        spec=SPEC,
        dtype=torch.float32,
        block_size=BLOCK_SIZE,
        session_limit=SESSION_LEN,
        decoder=decoder,
        mapped_bytes=0,
    )


def make_engine(**changes: object) -> Engine:
    values = {
        "model": "history",
        "device": "cuda",
        "block_size": BLOCK_SIZE,
        "cache_max_entry_count": 4,
    }
    config = EngineConfig.from_dict(values | changes)
    return Engine(config, LocalExecutor(config))


def random_params(rng: random.Random) -> SamplingParams:
    def some(**asked: object) -> dict[str, Any]:
        return {name: value for name, value in asked.items() if rng.random() < 0.3}

    tokens = [rng.randrange(VOCAB) for _ in range(8)]
    asked = some(
        repetition_penalty=1.3,
        presence_penalty=0.7,
        frequency_penalty=0.4,
        logit_bias={tokens[0]: 3.0, tokens[1]: -3.0},
        bad_words=[[tokens[2]], [tokens[3], tokens[4]]],
        min_tokens=rng.randint(1, 4),
        stop_token_ids=tokens[5:],
        allowed_token_ids=list(range(rng.randint(5, VOCAB))),
        logprobs=rng.randint(0, 3),
    )
    if rng.random() < 0.15:
        asked["prompt_logprobs"] = 1
    return SamplingParams(
        temperature=rng.choice([0.0, 0.8, 1.5]),
        seed=rng.randrange(1000),
        max_tokens=rng.randint(4, 9),
        **asked,
    )


def random_requests(rng: random.Random, number: int) -> list[EngineRequest]:
    stem = [rng.randrange(VOCAB) for _ in range(2 * BLOCK_SIZE)]
    requests = []
    for index in range(number):
        own = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))]
        prompt = stem[: rng.choice([0, 0, BLOCK_SIZE, 2 * BLOCK_SIZE])] + own
        requests.append(
            EngineRequest(
                request_id=str(index),
                prompt_token_ids=prompt,
                params=random_params(rng),
                eos_token_ids=(EOS,),
            )
        )
    return requests


def serve(
    engine: Engine, requests: list[EngineRequest], rng: random.Random | None = None
) -> dict[str, SequenceOutput]:
    """With `rng` they come at any time, and some are aborted early, as by a stop string."""
    coming = list(requests)
    cut = {each.request_id: rng.choice([2, 99, 99]) if rng else 99 for each in requests}
    outputs: dict[str, SequenceOutput] = {}
    while coming or engine.has_work:
        while coming and (rng is None or not engine.has_work or rng.random() < 0.4):
            engine.add(coming.pop(0))
        for output in engine.step():
            earlier = outputs.setdefault(output.request_id, output)
            if earlier is not output:
                earlier.merge(output)
            if len(earlier.token_ids) >= cut[output.request_id]:
                engine.abort(output.request_id)
        engine.scheduler.check_integrity()
    assert engine.scheduler.block_manager.num_free_blocks == engine.info.num_blocks
    return outputs


@pytest.mark.parametrize("seed", [12])
def test_tokens_and_scores_are_those_of_a_quiet_engine(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RankModel, "load", load)
    rng = random.Random(seed)
    requests = random_requests(rng, 6)
    busy = make_engine(max_num_batched_tokens=rng.choice([5, 16, 40]), max_num_seqs=3)
    found = serve(busy, requests, rng)
    assert busy.stats().num_preemptions > 0
    assert busy.stats().prefix_cache_hits > 0
    quiet = make_engine(
        cache_max_entry_count=64,
        max_num_seqs=8,
        enable_async_scheduling=False,
        enable_prefix_caching=False,
    )
    expected = serve(quiet, requests)
    for request_id, output in found.items():
        alone, count = expected[request_id], len(output.token_ids)
        assert output.token_ids == alone.token_ids[:count]
        assert output.prompt_logprobs == alone.prompt_logprobs
        assert (output.logprobs or []) == (alone.logprobs or [])[:count]
        assert output.finish_reason in (None, alone.finish_reason)
