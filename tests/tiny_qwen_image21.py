"""A tiny QwenImage21Pipeline with random weights, its text encoder and processor included, without any file."""

import matplotlib.cbook
import PIL.Image
import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

WIDTH = 32
"""Channels of a prompt's embedding"""
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>"]  # fmt: skip
_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[0].text }}<|im_end|>\n{% endfor %}"


def transformer(dtype=torch.float32, **changes) -> QwenImage21Transformer2DModel:
    torch.manual_seed(0)
    model = QwenImage21Transformer2DModel(
        in_channels=8, out_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        context_in_dim=WIDTH, axes_dims_rope=(4, 6, 6), **changes,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name:  # else gates are nearly 0 and attention changes nothing
                parameter.mul_(8)
    return model.to(dtype).eval().requires_grad_(False)


class Processor(Qwen3VLProcessor):
    """Without the video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def processor() -> Processor:
    symbols = [chr(i) for i in range(33, 127)] + [chr(i) for i in range(161, 173)] + [chr(i) for i in range(174, 324)]
    tokenizer = Qwen2Tokenizer(vocab={x: i for i, x in enumerate(symbols)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": _SPECIAL})
    images = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, min_pixels=1024, max_pixels=2**20)
    return Processor(images, tokenizer, None, chat_template=_TEMPLATE)


def text_encoder(processor: Processor, dtype) -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(1)
    of = processor.tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(processor.tokenizer), "hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2],
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=of("<|image_pad|>"), video_token_id=of("<|video_pad|>"),
        vision_start_token_id=of("<|vision_start|>"), vision_end_token_id=of("<|vision_end|>"),
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config).to(dtype).eval()


def pipeline(transformer: QwenImage21Transformer2DModel) -> QwenImage21Pipeline:
    dtype = transformer.dtype
    torch.manual_seed(2)
    vae = AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=8, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1] * 8, latents_std=[0.5] * 8,
    ).to(dtype).eval()  # fmt: skip
    reads = processor()
    pipe = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=text_encoder(reads, dtype),
        processor=reads, transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def photographs(count: int) -> list[PIL.Image.Image]:
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        found = PIL.Image.open(file).convert("RGB").resize((64, 64))
    return [found.rotate(90 * i) for i in range(count)]
