"""Training and prediction in bf16, also on a processor without bf16 instructions.

There torch multiplies bf16 matrices entry by entry, about ten times as slowly as fp32. `products`
hands such products to the fp32 kernels and rounds the result once: what bf16 instructions do as well,
which multiply exactly and add in fp32, up to the order of the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from armada_lib import machine

_aten = torch.ops.aten
PRODUCTS = {
    _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default,
    _aten.mv.default, _aten.addmv.default, _aten.dot.default,
    _aten.convolution.default, _aten.convolution_backward.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    # under torch.inference_mode these arrive whole
    _aten.linear.default, _aten.matmul.default, _aten.scaled_dot_product_attention.default,
}  # fmt: skip


class _Widened(TorchDispatchMode):
    def __torch_dispatch__(
        self,
        function: Callable,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # autocast has cast all operands of a product alike, and the first argument is one of them
        if function not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return function(*args, **kwargs)
        wide = lambda x: x.float() if x.dtype == torch.bfloat16 else x
        args, kwargs = tree_map_only(torch.Tensor, wide, (tuple(args), dict(kwargs)))
        out = function(*args, **kwargs)
        if function is _aten._scaled_dot_product_flash_attention_for_cpu.default:
            return out[0].bfloat16(), out[1]  # the logsumexp is fp32 in torch's bf16 kernel too
        return tree_map_only(torch.Tensor, torch.Tensor.bfloat16, out)


def products(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """While it lasts, bf16 products on a CPU without bf16 instructions are quick; else it does nothing.

    A backward pass needs it as much as a forward pass does.
    """
    slow = bf16 and device.type == "cpu" and not machine.bf16(device)
    return _Widened() if slow else nullcontext()


@contextmanager
def to_bf16(device: torch.device, bf16: bool) -> Iterator[None]:
    """torch's autocast to bf16 if `bf16` (else fp32), with `products`."""
    with products(device, bf16), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        yield
