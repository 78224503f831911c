"""The two architectures: real Qwen2.5-VL at toy width, and how they are built, fed and saved.

Positions are those of transformers 5 (`data.positions`), which the saved config says: text after a video counts on from
the video's rows and columns, not from its last grid step.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

from training.render import CELLS, IMAGE_MEAN, IMAGE_STD, MERGE, PATCH, TEMPORAL
from training.tokenizer import SPECIAL, VOCAB_SIZE

SIZES = {  # text width, layers, heads, MLP; vision width, layers, heads, MLP
    "target": {"text": (384, 6, 6, 1152), "vision": (256, 4, 4, 768)},
    "draft": {"text": (192, 3, 3, 512), "vision": (128, 3, 2, 384)},
    "tiny": {"text": (64, 2, 1, 96), "vision": (64, 1, 1, 96)},
}
HEAD_DIM = 64
PATCHES = (CELLS * MERGE) ** 2  # patches a frame pair


def config(size: str, tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """The configuration of `size`; one time position a grid step, no vision windows, tied embeddings."""
    width, layers, heads, mlp = SIZES[size]["text"]
    vision_width, depth, vision_heads, vision_mlp = SIZES[size]["vision"]
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    tokens = {"bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 3, 1),
        "intermediate_size": mlp,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [10, 11, 11]},
        **tokens,
    }
    vision = {
        "hidden_size": vision_width,
        "depth": depth,
        "num_heads": vision_heads,
        "intermediate_size": vision_mlp,
        "out_hidden_size": width,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "tokens_per_second": 1,
        "fullatt_block_indexes": list(range(depth)),
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_positions="transformers",  # how `data.positions` counts; specvlm reads it
        **tokens,
    )


def build(size: str, tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised model of `size` in float32."""
    return Qwen2_5_VLForConditionalGeneration(config(size, tokenizer)).float()


# ---------------------------------------------------------------------------------------------------------- forward


def framewise_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: object
) -> tuple[Tensor, None]:
    """Attention inside each frame pair of [1, heads, frames * PATCHES, head_dim], as one call for all frames."""
    heads, dim = query.shape[1], query.shape[3]
    query, key, value = (x.view(heads, -1, PATCHES, dim).transpose(0, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value)  # [frames, heads, PATCHES, dim]
    return out.transpose(1, 2).reshape(1, -1, heads, dim), None


AttentionInterface.register("framewise", framewise_attention)


def visual_positions(device: torch.device) -> Tensor:
    """Row and column [2, PATCHES] of a frame's patches in merge order."""
    axis = torch.arange(CELLS * MERGE, device=device)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
    return grid.view(2, CELLS, MERGE, CELLS, MERGE).transpose(2, 3).flatten(1)


def visual_tokens(model: Qwen2_5_VLForConditionalGeneration, patches: Tensor) -> Tensor:
    """Merged visual tokens [patches / 4, width]: the tower's own blocks, without its Python loop over frames."""
    tower = model.model.visual
    hidden = tower.patch_embed(patches)
    angles = visual_positions(hidden.device)[..., None].float() * tower.rotary_pos_emb.inv_freq
    angles = torch.cat([angles[0], angles[1]] * 2, dim=-1).repeat(len(hidden) // PATCHES, 1)
    rope, whole = (angles.cos(), angles.sin()), torch.tensor([0, len(hidden)])
    for block in tower.blocks:
        hidden = block(hidden, cu_seqlens=whole, position_embeddings=rope)
    return tower.merger(hidden)


def hidden_states(model: Qwen2_5_VLForConditionalGeneration, ids: Tensor, positions: Tensor, visual: Tensor) -> Tensor:
    """Last hidden states [B, L, width] of `ids` [B, L] at `positions` [3, B, L], with `visual` at the video tokens."""
    embeds = model.get_input_embeddings()(ids)
    video = (ids == model.config.video_token_id)[..., None].expand_as(embeds)
    embeds = embeds.masked_scatter(video, visual.to(embeds.dtype))
    text = model.model.language_model
    return text(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state


# ------------------------------------------------------------------------------------------------------------ saving


def _processor_files(folder: Path) -> None:
    """Processor settings that leave small frames as they are; Qwen's defaults would enlarge them."""
    common = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 1280 * 28 * 28},
        "processor_class": "Qwen2_5_VLProcessor",
    }
    image = common | {"image_processor_type": "Qwen2VLImageProcessor"}
    video = common | {"video_processor_type": "Qwen2VLVideoProcessor", "cap_pixels_per_frame": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n")
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n")


def save(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Everything that `from_pretrained` and `AutoProcessor` need, with weights rounded to bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    rounded = Qwen2_5_VLForConditionalGeneration(model.config)
    rounded.load_state_dict({name: value.detach().cpu() for name, value in model.state_dict().items()})
    rounded, text = rounded.to(torch.bfloat16), model.config.text_config
    rounded.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    rounded.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    _processor_files(folder)


def load(folder: Path, device: str = "cpu") -> Qwen2_5_VLForConditionalGeneration:
    """A saved model in float32."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device).eval()
