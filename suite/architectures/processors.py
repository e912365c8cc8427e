"""The tokenizer and the processor of a tiny vision-language model, without which vLLM starts no engine of one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What the processors of Qwen's models look up in the tokenizer, by the name under which the config has its id.
TOKENS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip
SIZE = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}  # of a picture, in pixels


def write(config: dict[str, Any], path: Path) -> None:
    """Write both into the directory `path`, for a model with this config. transformers needs torchvision for it."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    pictures = {"size": SIZE, "patch_size": config["vision_config"]["patch_size"]}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pictures),
        tokenizer=tokenizer(config),
        video_processor=Qwen3VLVideoProcessor(**pictures),
    ).save_pretrained(path)


def tokenizer(config: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Of words between spaces: w0, w1 and so on, by their ids, but for those of TOKENS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {config[name]: token for name, token in TOKENS.items()}
    words = {special.get(index, f"w{index}"): index for index in range(config["text_config"]["vocab_size"])}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="w0", eos_token="w1", pad_token="w2",
        additional_special_tokens=[*special.values()],
    )  # fmt: skip
