"""Train encoders whose weights would not fit: on the meta device, drawn and quantised one weight at a time.

    python examples/low_memory.py                 three steps, int8, on a CPU: about a minute
    python examples/low_memory.py --layers 2      a quick look
    python examples/low_memory.py --preset qwen3-embedding-8b+dinov3-7b          nf4: 9 GiB of weights
    python examples/low_memory.py --preset qwen3-embedding-8b+dinov3-7b --plan   what a step takes, on which GPUs

The first two are a ViT-H and a BERT of a thousand million parameters, whose fp32 weights take more than 6 GiB: they
train in a process of 4 GiB. Those of the preset take more than 50. Blocks are built on the meta device, which holds no
numbers, and get their (here random) values one weight at a time, each quantised before the next is drawn. What trains
is LoRA, mask tokens and the head. The peak that is printed at the end is that of the whole process, libraries included.
"""

import argparse
import copy
import resource
import time
from dataclasses import dataclass

import torch
from transformers import AutoModel, BertConfig, DINOv3ViTConfig, PreTrainedConfig, Qwen3Config, ViTConfig

from u2a_fast import U2A, LoraConfig
from u2a_fast.encoders import Encoder, from_pretrained_model
from u2a_fast.encoders.frozen import materialise_block
from u2a_fast.memory import plan, print_plan


@dataclass(frozen=True)
class Preset:
    """Two encoders, and how their weights are stored."""

    image: PreTrainedConfig
    text: PreTrainedConfig
    quantization: str


IMAGE = ViTConfig(  # ViT-H/14: 0.63e9 parameters
    hidden_size=1280,
    num_hidden_layers=32,
    num_attention_heads=16,
    intermediate_size=5120,
    patch_size=14,
    image_size=112,
)
TEXT = BertConfig(  # 1.03e9 parameters in the blocks
    hidden_size=1792, num_hidden_layers=26, num_attention_heads=28, intermediate_size=7168, vocab_size=30522
)
DINOV3_7B = DINOv3ViTConfig(  # 6.7e9
    hidden_size=4096,
    num_hidden_layers=40,
    num_attention_heads=32,
    intermediate_size=8192,
    use_gated_mlp=True,
    hidden_act="silu",
    query_bias=False,
    value_bias=False,
    patch_size=16,
    image_size=224,
    num_register_tokens=4,
)
QWEN3_EMBEDDING_8B = Qwen3Config(  # 7.6e9
    hidden_size=4096,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=12288,
    vocab_size=151665,
    max_position_embeddings=40960,
    rope_theta=1e6,
)
PRESETS = {
    "bert-1b+vit-h": Preset(IMAGE, TEXT, "int8"),
    "qwen3-embedding-8b+dinov3-7b": Preset(DINOV3_7B, QWEN3_EMBEDDING_8B, "nf4"),
}


def draw(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Random values of a parameter on the meta device, as its family would initialise it."""
    if parameter.dim() == 2:
        return torch.randn(parameter.shape).mul_(0.02)
    return torch.zeros(parameter.shape) if name.endswith("bias") else torch.ones(parameter.shape)


def random_encoder(config: PreTrainedConfig, mode: str) -> Encoder:
    """An encoder of random weights in bf16, its linears stored in `mode`, without ever holding its fp32 weights."""
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = 1
    encoder = from_pretrained_model(AutoModel.from_config(shallow, dtype=torch.bfloat16))
    with torch.device("meta"):
        blocks = from_pretrained_model(AutoModel.from_config(config)).blocks
    for block in blocks:
        materialise_block(block, mode, draw)
    encoder.blocks = blocks.bfloat16()
    return encoder.train()


def batch(preset: Preset, size: int, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    side = preset.image.image_size
    present = torch.ones(size, 2, dtype=torch.bool)
    present[::2, 0] = False  # every other sample comes without its image
    return {
        "image": {"pixel_values": torch.randn(size, 3, side, side, generator=generator)},
        "text": {"input_ids": torch.randint(5, preset.text.vocab_size, (size, 16), generator=generator)},
        "modality_mask": present,
        "labels": torch.arange(size) % 2,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", choices=PRESETS, default="bert-1b+vit-h")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--layers", type=int, default=None, help="of each encoder, all by default")
    parser.add_argument("--quantization", default=None, help="int8, int8_w8a8 or nf4; the preset's by default")
    parser.add_argument("--plan", action="store_true", help="count what a step would take, and build nothing")
    options = parser.parse_args()
    torch.manual_seed(0)
    preset = PRESETS[options.preset]
    mode = options.quantization or preset.quantization
    for config in (preset.image, preset.text):
        config.num_hidden_layers = options.layers or config.num_hidden_layers
    if options.plan:
        configs = {"image": preset.image, "text": preset.text}
        return print_plan(plan(configs, batch=options.batch, quantization=mode, checkpointing=True))
    train(preset, mode, options.steps, options.batch)


def train(preset: Preset, mode: str, steps: int, size: int) -> None:
    start = time.perf_counter()
    encoders = {"image": random_encoder(preset.image, mode), "text": random_encoder(preset.text, mode)}
    model = U2A(encoders, num_labels=2, lora=LoraConfig(r=8), modality_dropout=0.0).train()
    model.activation_checkpointing_enable()
    model.print_trainable_parameters()
    total = model.get_nb_trainable_parameters()[1]
    print(f"built in {time.perf_counter() - start:.0f} s; fp32 weights would take {4 * total / 2**30:.2f} GiB")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        start = time.perf_counter()
        loss = model(**batch(preset, size, seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}, {time.perf_counter() - start:.1f} s")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
