"""bf16 without bf16 instructions: the same numbers as torch's own bf16, from fp32 kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from armada_lib import autocast, machine

CPU = torch.device("cpu")


@pytest.fixture
def without(monkeypatch):
    monkeypatch.setattr(machine, "bf16", lambda device="cpu": False)


class Small(nn.Module):
    """Each kind of product that students, aligners and frozen encoders compute."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(2, 4, 3)
        self.read, self.write = nn.Linear(16, 48), nn.Linear(16, 16, bias=False)
        self.mix = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.image(x).flatten(1).view(len(x), 4, -1)
        q, k, v = (t.view(len(x), 4, 2, 8).transpose(1, 2) for t in self.read(x).chunk(3, -1))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), 4, 16)
        return self.write(x @ self.mix) @ torch.bmm(x, x.transpose(1, 2)).mean(1).mean(0).repeat(4)


def outcome() -> tuple[torch.Tensor, torch.Tensor]:
    """(output, all gradients) of one pass in bf16 from the same start."""
    torch.manual_seed(0)
    model, x = Small(), torch.randn(3, 2, 6, 6)
    with autocast.products(CPU, True):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        out.float().square().sum().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_results_are_those_of_bf16_up_to_the_order_of_sums(monkeypatch):
    monkeypatch.setattr(machine, "bf16", lambda device="cpu": True)
    out, grad = outcome()
    monkeypatch.setattr(machine, "bf16", lambda device="cpu": False)
    for own, given in zip((out, grad), outcome(), strict=True):
        assert own.dtype == given.dtype
        apart = (own.float() - given.float()).norm() / own.float().norm()
        assert apart < 4e-3, "more than a rounding to bf16 (2**-8)"


@pytest.mark.parametrize("whole", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_no_product_reaches_the_bf16_kernels(without, whole):
    """They are the slow ones: whatever a pass computes in bf16 comes from a product in fp32."""
    met: list[torch.dtype] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in autocast.PRODUCTS:
                met.append(next(a.dtype for a in args if isinstance(a, torch.Tensor)))
            return function(*args, **(kwargs or {}))

    model = Small()
    with Watch(), whole():
        with autocast.to_bf16(CPU, True):
            out = model(torch.randn(3, 2, 6, 6))
        assert out.dtype == torch.bfloat16
        if out.requires_grad:
            with autocast.products(CPU, True):
                out.float().sum().backward()
    assert len(met) >= 6 and set(met) == {torch.float32}


def test_products_are_rounded_once(without):
    torch.manual_seed(0)
    a, b = torch.randn(5, 7).bfloat16(), torch.randn(7, 4).bfloat16()
    with autocast.products(CPU, True):
        found = a @ b
    assert torch.equal(found, (a.double() @ b.double()).float().bfloat16())


def test_nothing_is_touched_where_bf16_is_native_or_not_asked_for(without, monkeypatch):
    assert not isinstance(autocast.products(CPU, False), autocast._Widened)
    assert not isinstance(autocast.products(torch.device("cuda"), True), autocast._Widened)
    monkeypatch.setattr(machine, "bf16", lambda device="cpu": True)
    assert not isinstance(autocast.products(CPU, True), autocast._Widened)
    x = torch.randn(3, 3)
    with autocast.to_bf16(CPU, False):
        assert (x @ x).dtype == torch.float32
    with autocast.to_bf16(CPU, True):
        assert (x @ x).dtype == torch.bfloat16
