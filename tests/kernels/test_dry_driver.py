"""What happens on the way to a launch: which binaries are built, whether they fit, how many launches there are."""

import random
from functools import partial

import parity
import pytest
import tiny_encoders
import torch
import triton
import triton.language as tl
from dry_driver import SHARED, dry
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from u2a_fast import U2A, LoraConfig
from u2a_fast.encoders import from_pretrained_model
from u2a_fast.kernels import backend


# ---------------------------------------------------------------------------------------------------- the driver itself
@triton.jit
def copy(X, Y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=i < n), mask=i < n)


@triton.jit
def square(X, Y, K, SIZE: tl.constexpr):
    """X X^T in tiles of [SIZE, SIZE], several of which are in flight."""
    i = tl.arange(0, SIZE)
    at = X + i[:, None] * K + i[None, :]
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, K, SIZE):
        tile = tl.load(at + k)
        acc = tl.dot(tile, tl.trans(tile), acc)
    tl.store(Y + i[:, None] * SIZE + i[None, :], acc)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_a_kernel_is_compiled_once_for_each_specialisation_and_counted_at_every_launch(target):
    x = torch.ones(64)
    with dry(target) as device:
        for n in (17, 18, 32):
            copy[(1,)](x, x, n, BLOCK=64)
    assert device.launches == {"copy": 3}
    assert len(device.variants) == len(device.binaries) == 2  # 32 is a multiple of 16
    for binary in device.binaries:
        assert (binary.kernel, binary.shared, binary.spills) == ("copy", 0, 0)
        assert 0 < binary.registers < 64


def test_launches_and_variants_are_counted_without_a_compiler():
    x = torch.ones(64)
    with dry("sm_90", compiles=False) as device:
        for n in (17, 18, 32):
            copy[(1,)](x, x, n, BLOCK=64)
    assert device.launches == {"copy": 3}
    assert len(device.variants) == 2 and not device.binaries


def test_what_exceeds_the_targets_shared_memory_is_refused():
    x = torch.ones(256, 256, dtype=torch.float16)
    run = partial(square[(1,)], x, x, 256, SIZE=128, num_warps=8, num_stages=5)
    with dry("sm_80") as large:
        run()
    assert SHARED["sm_89"] < large.binaries[0].shared <= SHARED["sm_80"]
    with dry("sm_89") as small, pytest.raises(OutOfResources, match="shared memory"):
        run()
    assert not small.launches


def test_everything_is_as_before_even_after_an_error():
    places = ((driver, "_active"), (backend, "resolve"), (torch.version, "hip"), (torch.cuda, "device_of"))
    before = [getattr(place, name) for place, name in places]
    with pytest.raises(ZeroDivisionError), dry("gfx942"):
        assert torch.version.hip is not None
        1 / 0  # noqa: B018
    assert [getattr(place, name) for place, name in places] == before
    assert not triton.knobs.compilation.disable_line_info and triton.knobs.runtime.jit_cache_hook is None


# --------------------------------------------------------------------------------------- how many launches and binaries
LAUNCHES = 12  # of a block, forward and backward
BINARIES = 29  # of U2A's steps with two encoders under autocast


def test_a_blocks_launches_are_few():
    block = from_pretrained_model(tiny_encoders.build("vit")).bfloat16().blocks[0]
    for layer in block.linears:
        layer.add_adapter(LoraConfig(r=4))
    tokens = torch.randn(2, 197, tiny_encoders.WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with dry("sm_90", compiles=False) as device:
        block(tokens).sum().backward()
    assert device.launches.total() <= LAUNCHES, device.launches


FAMILIES = {"image": "vit", "text": "bert"}


def sizes():
    """(batch, tokens of the longest text) of 60 steps: odd at first, then all that Triton could specialise on."""
    draw = random.Random(0)
    yield from [(2 * draw.randint(2, 60) + 1, draw.choice((3, 5, 7))) for _ in range(30)]
    yield from [(1, 2), (2, 1), (16, 4), (32, 7), (64, 2), (128, 6), (256, 7), (17, 1), (100, 4), (1, 7)]
    yield from [(draw.randint(1, 128), draw.randint(1, 7)) for _ in range(20)]


@pytest.mark.slow
def test_steps_of_new_sizes_compile_nothing_new():
    model = U2A(tiny_encoders.build_many(FAMILIES), num_labels=5, lora=LoraConfig(r=4))
    built = []
    with dry("sm_90", compiles=False) as device:
        for step, (batch, tokens) in enumerate(sizes()):
            inputs = tiny_encoders.inputs_many(FAMILIES, batch, seed=step, padded=True)
            inputs["text"] = {name: t[:, :tokens] for name, t in inputs["text"].items()}
            present, labels = parity.random_presence(batch, 2, step), torch.arange(batch) % 5
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**inputs, modality_mask=present, labels=labels).loss
            loss.backward()
            built.append(set(device.variants))
    late = built[-1] - built[29]
    assert not late, sorted(late)
    assert len(built[-1]) <= BINARIES, sorted(built[-1])
