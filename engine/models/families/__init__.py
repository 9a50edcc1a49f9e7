"""One file per model family: a Hugging Face config in, a DecoderSpec out."""
