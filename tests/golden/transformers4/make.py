"""Wrote the folders beside it, with transformers 4.57.1 and PEFT 0.21.2: encoders, adapters and what they computed.

ViT's linears and CLIP's towers had other names then. Widths of 8 keep the files small.
"""

from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, ViTConfig, ViTModel

torch.manual_seed(0)
SIZES = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
VIT = ViTConfig(image_size=8, patch_size=4, **SIZES)
CLIP = CLIPTextConfig(vocab_size=9, max_position_embeddings=8, eos_token_id=8, **SIZES)

# name -> model, its inputs, and the modules to adapt: a pattern of the old names, and names that several modules end in
CASES = {
    "vit": (
        ViTModel(VIT, add_pooling_layer=False),
        {"pixel_values": torch.randn(2, 3, 8, 8)},
        {
            "target_modules": ["query", "value", "attention.output.dense", "intermediate.dense"],
            "rank_pattern": {"layer.0.attention.attention.query": 3},
            "alpha_pattern": {"attention.attention.value": 6, "intermediate.dense": 2},
            "use_rslora": True,
        },
    ),
    "clip_text": (
        CLIPTextModel(CLIP),
        {"input_ids": torch.tensor([[1, 2, 3, 8], [4, 5, 6, 8]])},
        {"target_modules": r"text_model.*\.(q_proj|out_proj|fc2)", "lora_alpha": 5},
    ),
}


def main() -> None:
    for name, (encoder, inputs, options) in CASES.items():
        folder = Path(__file__).parent / name
        encoder.save_pretrained(folder)
        adapted = peft.get_peft_model(encoder.eval(), peft.LoraConfig(r=2, init_lora_weights=False, **options))
        adapted.save_pretrained(folder / "adapter")
        (folder / "adapter" / "README.md").unlink()
        with torch.no_grad():
            hidden = adapted(**inputs).last_hidden_state
        save_file({**inputs, "last_hidden_state": hidden}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
