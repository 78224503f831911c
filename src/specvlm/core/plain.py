"""Whether a Hugging Face module still computes what its class says, so that fused code may stand in for it.

Quantisation, adapters, offloading and patches change a module without changing its class: by another kind of weight, by
weights besides, by hooks, or by a forward function of the instance. Nothing of that kind is ever taken over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def is_patched(module: Any) -> bool:
    """Whether a module has hooks or a forward function that is not its class's own; its children are not looked at."""
    is_own = "forward" not in vars(module) and type(module).forward.__module__ == type(module).__module__
    return not is_own or any(getattr(module, hooks) for hooks in _HOOKS)


def is_untouched(module: Any) -> bool:
    """Whether a call of a module is a call of its class's own forward function: no hook is there for all modules."""
    return not is_patched(module) and not any(getattr(every_module, f"_global{hooks}") for hooks in _HOOKS)


def is_plain(module: Any, like: Tensor) -> bool:
    """Whether a module is untouched and has nothing but a dense weight, and perhaps a bias, of the kind of `like`."""
    weights = [weight for weight in module.parameters() if weight is not None]
    return (
        is_untouched(module)
        and not module._modules
        and not module._buffers
        and module._parameters.keys() <= {"weight", "bias"}
        and module._parameters.get("weight") is not None
        and all(is_weight(weight, like) for weight in weights)
    )


def is_linear(module: Any, like: Tensor, *, has_bias: bool) -> bool:
    """Whether a module is torch's own linear layer, and plain."""
    return type(module) is nn.Linear and is_plain(module, like) and (module.bias is not None) == has_bias


def is_weight(weight: Any, like: Tensor) -> bool:
    """Whether a weight is a dense tensor of the type and on the device of another one."""
    is_dense = type(weight) is nn.Parameter and weight.layout == torch.strided
    return is_dense and weight.dtype == like.dtype and weight.device == like.device


@torch.no_grad()
def joined(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Join the weights, and the biases, of linear layers that read the same rows; the layers keep views of them."""
    weight = torch.cat([module.weight for module in linears])
    bias = None if linears[0].bias is None else torch.cat([module.bias for module in linears])
    begin = 0
    for module in linears:
        end = begin + module.out_features
        module.weight = nn.Parameter(weight[begin:end], requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(bias[begin:end], requires_grad=False)
        begin = end
    if weight.is_cuda:
        torch.cuda.empty_cache()  # else the freed halves pile up to a second copy of the model
    return weight, bias
