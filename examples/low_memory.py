"""Train a ViT-H-sized and a thousand-million-parameter BERT-like encoder in 4 GiB of process memory.

    python examples/low_memory.py                 three steps, int8, on a CPU: about a minute
    python examples/low_memory.py --layers 2      a quick look

Their fp32 weights alone take more than 6 GiB. Blocks are built on the meta device, which holds no numbers, and get
their (here random) values one weight at a time, each quantised before the next is drawn. What trains is LoRA, mask
tokens and the head. The peak that is printed at the end is that of the whole process, libraries included.
"""

import argparse
import copy
import resource
import time

import torch
from transformers import AutoModel, BertConfig, PreTrainedConfig, ViTConfig

from u2a_fast import U2A, LoraConfig
from u2a_fast.encoders import Encoder, from_pretrained_model
from u2a_fast.encoders.frozen import materialise_block

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


def draw(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Random values of a parameter on the meta device, as its family would initialise it."""
    if name.startswith("norm"):
        return torch.ones(parameter.shape) if name.endswith("weight") else torch.zeros(parameter.shape)
    return torch.randn(parameter.shape).mul_(0.02) if parameter.dim() == 2 else torch.zeros(parameter.shape)


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


def batch(size: int, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    side = IMAGE.image_size
    present = torch.ones(size, 2, dtype=torch.bool)
    present[::2, 0] = False  # every other sample comes without its image
    return {
        "image": {"pixel_values": torch.randn(size, 3, side, side, generator=generator)},
        "text": {"input_ids": torch.randint(5, TEXT.vocab_size, (size, 16), generator=generator)},
        "modality_mask": present,
        "labels": torch.arange(size) % 2,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--layers", type=int, default=None, help="of each encoder, all by default")
    parser.add_argument("--quantization", default="int8")
    options = parser.parse_args()
    torch.manual_seed(0)
    for config in (IMAGE, TEXT):
        config.num_hidden_layers = options.layers or config.num_hidden_layers
    start = time.perf_counter()
    encoders = {
        "image": random_encoder(IMAGE, options.quantization),
        "text": random_encoder(TEXT, options.quantization),
    }
    model = U2A(encoders, num_labels=2, lora=LoraConfig(r=8), modality_dropout=0.0).train()
    model.activation_checkpointing_enable()
    model.print_trainable_parameters()
    total = model.get_nb_trainable_parameters()[1]
    print(f"built in {time.perf_counter() - start:.0f} s; fp32 weights would take {4 * total / 2**30:.2f} GiB")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(options.steps):
        start = time.perf_counter()
        loss = model(**batch(options.batch, seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}, {time.perf_counter() - start:.1f} s")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
