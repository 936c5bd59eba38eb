"""int8 rows of two implementations, compared."""

import torch


def assert_same_rows(got, expected, device):
    """Bit for bit on a CPU. A GPU divides by 127 to the last bit but one, and a value between two steps may fall."""
    (q, scale), (exact_q, exact_scale) = got, expected
    if device.type == "cpu":
        assert torch.equal(scale, exact_scale) and torch.equal(q, exact_q)
    torch.testing.assert_close(scale, exact_scale, rtol=3e-7, atol=0)
    off = (q.int() - exact_q.int()).abs()
    assert not off.numel() or (off.max() <= 1 and (off > 0).double().mean() < 1e-2)
