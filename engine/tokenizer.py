"""Tokenizer: text to token ids and back, as the checkpoint's tokenizer files say.

Wraps the fast tokenizer transformers loads. Calls go to its Rust backend, which is safe from any
thread, because nothing here changes its state after loading. Its batch calls release the GIL; the
others keep it (1.4 s for 1 MiB of text).
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from engine.chat_template import ChatTemplate, Message
from engine.errors import CheckpointError, InvalidRequestError
from engine.generation_config import GenerationConfig


class Tokenizer:
    def __init__(self, hf: PreTrainedTokenizerFast, generation_config: GenerationConfig) -> None:
        self.sampling_defaults: Mapping[str, float] = generation_config.sampling
        self.chat_template = ChatTemplate(hf) if hf.chat_template else None
        eos = [*generation_config.eos_token_ids, hf.eos_token_id]
        self.eos_token_ids = tuple(sorted({i for i in eos if i is not None}))
        self._backend: Backend = hf.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self._added_token_ids = frozenset(added)
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        self.longest_token = max(map(len, self._backend.get_vocab()))  # characters
        self._token_bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load from a checkpoint directory; never runs code from it, never uses a network."""
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a directory; a checkpoint's tokenizer is read")
        try:
            hf = _loader(path).from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, ImportError) as error:
            raise CheckpointError(
                f"{path} has no tokenizer that loads without remote code: {error}. Add its "
                "tokenizer.json and tokenizer_config.json"
            ) from error
        if not isinstance(hf, PreTrainedTokenizerFast):
            raise CheckpointError(
                f"{path} has only a slow tokenizer ({type(hf).__name__}); convert it with "
                "tokenizers and add its tokenizer.json"
            )
        return cls(hf, GenerationConfig.load(path))

    def same_vocabulary(self, other: "Tokenizer") -> bool:
        """Whether a token id stands for the same piece of text in both."""
        return bool(self._backend.get_vocab() == other._backend.get_vocab())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens are those the checkpoint adds by itself, such as bos."""
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        text: str
        (text,) = self._backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)
        return text

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Message] | None = None,
    ) -> list[int]:
        """Token ids of a chat. InvalidRequestError when the template cannot express it."""
        if self.chat_template is None:
            raise InvalidRequestError(
                "this model has no chat template; send a prompt to /v1/completions", "messages"
            )
        text = self.chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=chat_template_kwargs,
            tools=tools,
        )
        return self.encode(text, add_special_tokens=False)  # the template writes them itself

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, also where they are part of a character."""
        found = self._token_bytes.get(token_id)
        if found is None:
            found = self._token_bytes[token_id] = self._compute_token_bytes(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _compute_token_bytes(self, token_id: int) -> bytes:
        piece = self._backend.id_to_token(token_id)
        if piece is None:  # checkpoints pad the vocabulary beyond the tokenizer's
            return b""
        if token_id in self._added_token_ids:
            return piece.encode()
        if self.is_byte_level:
            return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(byte[1])
        return piece.replace("\u2581", " ").encode()

    @cached_property
    def is_byte_level(self) -> bool:
        """Tokens are spelt in GPT-2's byte alphabet, and decoding joins their bytes."""
        return isinstance(self._backend.decoder, decoders.ByteLevel)


def _loader(path: Path) -> Any:
    """The transformers class that reads the files.

    AutoTokenizer picks it from their configuration, but its import takes 2.8 s of CPU time (torch
    and its compiler), so the plain class is recognised here.
    """
    config = path / "tokenizer_config.json"
    if (path / "tokenizer.json").is_file() and config.is_file():
        plain = re.search(r'"tokenizer_class":\s*"(\w+)"', config.read_text(encoding="utf-8"))
        if plain is not None and plain[1] in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 is itself, the rest starts at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
