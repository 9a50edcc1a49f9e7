"""Token samples of a text: those to calibrate on, and others to measure the loss on.

Knows tokenizers and windows of tokens; nothing about models. The same text and seed give the same
samples on every machine, and what is held out depends on the text alone, so that an evaluation
never sees what an earlier calibration saw.
"""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import ConfigError, InvalidRequestError
from engine.quantize.texts import BUILTIN, BUILTINS, DATA, MAX_BYTES, Document, Texts, read_texts
from engine.tokenizer import Tokenizer

HELD_OUT_EVERY = 8  # of a file's documents every eighth, of a single text the last eighth
HELD_OUT_SHARE = 4  # a held-out sample for so many that are asked for
_BREAK = "\n\n"  # after a text, which has no token of its own to end it


@dataclass(frozen=True, slots=True)
class TextRecord:
    """What a report says about the text: enough to make the same samples again."""

    source: str
    sha256: str
    num_documents: int
    num_tokens: int
    seqlen: int
    seed: int
    num_samples: int  # to calibrate on
    num_held_out: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What the loss is measured on: the tokens of texts, and in chats those of the answers.

    What a user says is read and never written by a model; many are not trained to predict it.
    """

    token_ids: Tensor  # int64 [E, T]
    counted: Tensor  # bool [E, T]

    @classmethod
    def all_of(cls, token_ids: Tensor) -> "HeldOut":
        """With every token counted."""
        return cls(token_ids, torch.ones_like(token_ids, dtype=torch.bool))


@dataclass(frozen=True, slots=True)
class TokenSamples:
    calibration: Tensor  # int64 [S, T]
    held_out: HeldOut
    record: TextRecord


def samples(
    tokenizer: Tokenizer,
    source: str | Path = BUILTIN,
    *,
    num_samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
) -> TokenSamples:
    """Windows of `seqlen` tokens, without overlap, of a file or of the built-in set.

    The documents stand end to end, chats rendered by the model's template. A text that has fewer
    windows than asked for gives all it has, and the record says so; one without a window for each
    part is a ConfigError.
    """
    for name, value, least in (("samples", num_samples, 1), ("seqlen", seqlen, 2)):
        if value < least:
            raise ConfigError(f"calibration {name} must be at least {least}, got {value}")
    encoder = _Encoder(tokenizer)
    if str(source) in BUILTINS:
        kept, others = (
            [read_texts(DATA / each) for each in part] for part in BUILTINS[str(source)]
        )
        head = _flat(encoder.encode([each for text in kept for each in text.documents]))
        held_out = encoder.encode([each for text in others for each in text.documents])
        held, texts = _counted(held_out, encoder), kept + others
    else:
        texts = [read_texts(Path(source))]
        head, held = _split(encoder.encode(texts[0].documents), seqlen, encoder)
    _check_length(len(head), len(held), seqlen, source)
    num_held_out = max(1, num_samples // HELD_OUT_SHARE)
    calibration = _draw(torch.tensor(head), num_samples, seqlen, random.Random(seed))
    # By a seed of its own: another seed evaluates on the same tokens.
    drawn = _draw(torch.tensor(held), num_held_out, seqlen, random.Random(0))
    record = TextRecord(
        source=str(source),
        sha256=hashlib.sha256(b"".join(each.raw for each in texts)).hexdigest(),
        num_documents=encoder.num_documents,
        num_tokens=len(head) + len(held),
        seqlen=seqlen,
        seed=seed,
        num_samples=len(calibration),
        num_held_out=len(drawn),
        notes=(
            *_notes(texts, encoder),
            *_shortages(len(calibration), num_samples, len(drawn), num_held_out),
        ),
    )
    ids, counted = drawn.unbind(-1)
    if not counted[:, 1:].any():  # windows within one long question
        counted = torch.ones_like(counted)
    return TokenSamples(calibration, HeldOut(ids, counted.bool()), record)


Encoded = tuple[tuple[int, ...], Document]


class _Encoder:
    """Tokenises documents, and counts what has to be said about them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_documents = 0
        self.num_repeated = 0
        self.num_chats = 0
        self.num_joined = 0  # chats that the template refuses, or has no template for

    def encode(self, documents: Sequence[Document]) -> list["Encoded"]:
        """Each with its token ids; a document that was there before is left out."""
        unique: dict[tuple[int, ...], Document] = {}
        for document in documents:
            ids = tuple(self._ids(document))
            self.num_repeated += ids in unique
            unique.setdefault(ids, document)
        unique.pop((), None)
        self.num_documents += len(unique)
        return list(unique.items())

    def counted(self, ids: tuple[int, ...], document: Document) -> list[bool]:
        """The tokens of a chat's answers; all, where there are none or they cannot be told."""
        counted = [False] * len(ids)
        for index, message in enumerate(document.messages):
            if message["role"] == "assistant":
                start, stop = self._answer(ids, document, index)
                counted[start:stop] = [True] * (stop - start)
        return counted if any(counted) else [True] * len(ids)

    def _answer(self, ids: tuple[int, ...], document: Document, index: int) -> tuple[int, int]:
        """From the prompt's end to the answer's own end token."""
        try:
            prompt = self._tokenizer.render_chat(document.messages[:index], tools=document.tools)
            answered = self._tokenizer.render_chat(
                document.messages[: index + 1], add_generation_prompt=False, tools=document.tools
            )
        except InvalidRequestError:  # a template that wants whole chats
            return 0, 0
        start, stop = len(prompt), len(answered)
        if ids[:start] != tuple(prompt) or ids[:stop] != tuple(answered):
            return 0, 0  # a template that rewrites what came before
        ends = [i for i in range(start, stop) if ids[i] in self._tokenizer.eos_token_ids]
        return start, ends[-1] + 1 if ends else stop

    def _ids(self, document: Document) -> list[int]:
        if not document.messages:
            return self._tokenizer.encode(document.text + _BREAK)
        self.num_chats += 1
        try:
            return self._tokenizer.render_chat(
                document.messages, add_generation_prompt=False, tools=document.tools
            )
        except InvalidRequestError:
            self.num_joined += 1
            return self._tokenizer.encode(document.joined() + _BREAK)


def _split(
    documents: list[Encoded], seqlen: int, encoder: _Encoder
) -> tuple[list[int], list[tuple[int, bool]]]:
    """Tokens to calibrate on and tokens held out: whole documents if there are enough of them."""
    held_out = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    if sum(len(ids) for ids, _ in held_out) >= seqlen:
        kept = [each for i, each in enumerate(documents, start=1) if i % HELD_OUT_EVERY]
        return _flat(kept), _counted(held_out, encoder)
    stream = _counted(documents, encoder)
    start = max(0, len(stream) - max(seqlen, len(stream) // HELD_OUT_EVERY))
    return [token for token, _ in stream[:start]], stream[start:]


def _flat(documents: list[Encoded]) -> list[int]:
    return list(chain.from_iterable(ids for ids, _ in documents))


def _counted(documents: list[Encoded], encoder: _Encoder) -> list[tuple[int, bool]]:
    """Token ids, and whether each counts."""
    return [
        pair
        for ids, document in documents
        for pair in zip(ids, encoder.counted(ids, document), strict=True)
    ]


def _check_length(num_head: int, num_held: int, seqlen: int, source: str | Path) -> None:
    if num_head >= seqlen and num_held >= seqlen:
        return
    found = num_head + num_held
    raise ConfigError(
        f"the calibration text {source} has {found:,} tokens, and {2 * seqlen:,} are needed: one "
        f"sample of {seqlen:,} to calibrate on and one to measure the loss on. Give a longer text, "
        f"{BUILTIN!r}, or samples of at most {found // 2:,} tokens"
    )


def _draw(tokens: Tensor, num_samples: int, seqlen: int, rng: random.Random) -> Tensor:
    """[N, ...] -> [S, T, ...]: windows at multiples of T, none twice, in the text's order."""
    num_windows = len(tokens) // seqlen
    chosen = sorted(rng.sample(range(num_windows), min(num_samples, num_windows)))
    windows = tokens[: num_windows * seqlen].view(num_windows, seqlen, *tokens.shape[1:])
    return windows[torch.tensor(chosen)]


def _notes(texts: list[Texts], encoder: _Encoder) -> Iterable[str]:
    if any(each.cut for each in texts):
        yield f"Only the file's first {MAX_BYTES // 2**20} MiB are used."
    if encoder.num_repeated:
        yield f"{encoder.num_repeated:,} documents that repeat an earlier one are left out."
    if encoder.num_joined == encoder.num_chats > 0:
        yield "The model's tokenizer renders no such chats: their contents are joined as text."
    elif encoder.num_joined:
        yield (
            f"{encoder.num_joined:,} of {encoder.num_chats:,} chats, which the chat template "
            "refuses, are joined as text."
        )


def _shortages(samples: int, asked: int, held_out: int, wanted: int) -> Iterable[str]:
    if samples < asked:
        yield f"The text has {samples:,} samples to calibrate on, {asked:,} were asked for."
    if held_out < wanted:
        yield f"The text has {held_out:,} held-out samples, {wanted:,} were wanted."
