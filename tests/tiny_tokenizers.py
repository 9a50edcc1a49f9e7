"""Two small tokenizers of the kinds that matter: byte-level BPE, and SentencePiece's BPE."""

import json
from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from tests.tiny_models import TRAINING_LINES, write_tokenizer

LLAMA2_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('only user and assistant roles are supported') }}{% endif %}"
    "{{ '[' + message['role'] + '] ' + message['content'] + ' ' }}{% endfor %}"
    "{% if shout %}{{ shout }}{% endif %}"
)


def write_byte_level(directory: Path) -> Path:
    """GPT-2's kind (Llama 3, Qwen): every byte is a character of the vocabulary."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory)
    return directory


def write_byte_fallback(directory: Path) -> Path:
    """SentencePiece's kind (Llama 2, Mistral): spaces are ▁, unknown characters <0xHH> tokens."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False)
    trained.train_from_iterator(TRAINING_LINES[:2], trainer)
    specials = ["<unk>", "<s>", "</s>"]
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    names = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = LLAMA2_TEMPLATE
    fast.save_pretrained(directory)
    return directory
