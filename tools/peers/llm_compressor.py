"""llm-compressor, which writes compressed-tensors checkpoints."""

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")
PRESETS = ("W8A8", "W8A16", "FP8", "FP8_DYNAMIC", "FP8_BLOCK")
