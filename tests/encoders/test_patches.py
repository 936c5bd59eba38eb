"""Windows that do not overlap: a convolution, by one product."""

import pytest
import tiny_encoders
import torch
from torch import nn

from u2a_fast.encoders import from_pretrained_model
from u2a_fast.encoders.patches import PatchProjection, project_by_product

CONVOLUTIONS = {
    "pictures": (nn.Conv2d(3, 8, 4, 4), (2, 3, 12, 8)),
    "pixels that fill no patch": (nn.Conv2d(3, 8, 4, 4), (2, 3, 15, 9)),
    "no bias, no squares": (nn.Conv2d(1, 5, (2, 3), (2, 3), bias=False, padding="valid"), (3, 1, 5, 7)),
    "videos": (nn.Conv3d(3, 6, (2, 4, 4), (2, 4, 4)), (2, 3, 5, 8, 13)),
    "nobody": (nn.Conv2d(3, 8, 4, 4), (0, 3, 8, 8)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_product_of_patches_is_the_convolution_and_has_its_gradients(case, dtype):
    conv, shape = CONVOLUTIONS[case]
    conv, pixels = conv.to(dtype), torch.randn(shape, dtype=dtype, requires_grad=True)
    product = PatchProjection(conv)
    assert [name for name, _ in product.named_parameters()] == [name for name, _ in conv.named_parameters()]
    got, expected = product(pixels), conv(pixels)
    weight = torch.randn_like(expected)
    leaves = [pixels, *conv.parameters()]
    torch.testing.assert_close(got, expected)
    for g, exact in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (got, expected)), strict=True):
        torch.testing.assert_close(g, exact)
    if len(pixels):  # channels lie side by side, as blocks take them
        assert got.flatten(2).transpose(1, 2).is_contiguous()


def test_autocast_decides_what_is_multiplied():
    conv, shape = CONVOLUTIONS["pictures"]
    conv, pixels = conv.float(), torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = PatchProjection(conv)(pixels), conv(pixels)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 3, 3, 8), (2, 3, 8)])
def test_pixels_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="3 channels in patches of 4 x 4 pixels, not"):
        PatchProjection(nn.Conv2d(3, 8, 4, 4))(torch.zeros(shape))


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(3, 8, 4, 2), nn.Conv2d(3, 8, 4, 4, padding=1), nn.Conv2d(4, 8, 2, 2, groups=2), nn.Conv1d(3, 8, 2, 2)],
    ids=str,
)
def test_other_convolutions_stay(conv):
    module = nn.Sequential(conv, nn.Sequential(nn.Conv2d(3, 8, 2, 2, dilation=2)))
    assert project_by_product(module)[0] is conv and type(module[1][0]) is nn.Conv2d


@pytest.mark.parametrize("family", ["vit", "dinov2", "clip_vision", "siglip_vision", "videomae", "vit_mae"])
def test_encoders_have_products_and_the_model_given_keeps_its_convolution(family):
    model = tiny_encoders.build(family)
    of_model = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d))]
    (projection,) = [m for m in from_pretrained_model(model).modules() if isinstance(m, PatchProjection)]
    assert projection.weight.data_ptr() == of_model[0].weight.data_ptr()
    assert not [m for m in from_pretrained_model(model).modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
