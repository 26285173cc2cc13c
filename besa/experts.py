"""Mixtures of experts: linear maps of each expert while a block is worked on.

transformers keeps the experts of a block in fused 3-D parameters with one interface (`transformers.integrations.moe`).

    split(block)    expert i gets `nn.Linear` views of them, `i.up` (with the gate, if any) and `i.down`
    join(block)     the fused parameters again, with the values of these
"""

from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


def sources(fused: nn.Module) -> dict[str, str]:
    """Fused parameter of each kind of linear map."""
    return {"up": "gate_up_proj" if fused.has_gate else "up_proj", "down": "down_proj"}


def is_fused(module: nn.Module) -> bool:
    """Check for fused experts that can be split."""
    if not hasattr(module, "is_concatenated"):  # set by `use_experts_implementation`
        return False
    names = list(sources(module).values())
    if module.has_bias:
        names += [f"{name}_bias" for name in names]
    return set(names) == module._parameters.keys()


def routers(block: nn.Module) -> set[nn.Module]:
    """Modules that choose experts or weigh them: beside experts, with one matrix of one row, or of one per expert."""
    found = set()
    for parent in block.modules():
        for fused in parent.children():
            if hasattr(fused, "is_concatenated"):
                for child in parent.children():
                    matrices = [parameter for parameter in child.parameters() if parameter.ndim == 2]
                    if len(matrices) == 1 and len(matrices[0]) in (1, fused.num_experts):
                        found |= set(child.modules())
    return found


def linear_views(fused: nn.Module) -> dict[str, nn.Linear]:
    """Linear maps of all experts by name (`3.up`), without a copy."""
    linears = {}
    for index in range(len(fused.down_proj)):
        for kind, source in sources(fused).items():
            weight = getattr(fused, source).data[index]
            weight = weight.T if fused.is_transposed else weight
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=fused.has_bias, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if fused.has_bias:
                linear.bias = nn.Parameter(getattr(fused, f"{source}_bias").data[index], requires_grad=False)
            linears[f"{index}.{kind}"] = linear
    return linears


def split(module: nn.Module) -> nn.Module:
    """Replace the fused parameters in a module by linear maps, until `join`."""
    for fused in list(filter(is_fused, module.modules())):
        linears = linear_views(fused)
        fused.whole = dict(fused._parameters)
        fused._parameters.clear()
        for index in range(len(fused.whole["down_proj"])):
            expert = {kind: linears[f"{index}.{kind}"] for kind in ("up", "down")}
            fused.add_module(str(index), nn.ModuleDict(expert))
        fused.forward = partial(forward, fused)
    return module


def join(module: nn.Module) -> nn.Module:
    """Put the values of the linear maps into the fused parameters, and these into their place."""
    for fused in [each for each in module.modules() if "whole" in vars(each)]:
        experts = [fused._modules.pop(str(index)) for index in range(len(fused.whole["down_proj"]))]
        for name, parameter in fused.whole.items():
            linears = [expert["down" if name.startswith("down") else "up"] for expert in experts]
            if name.endswith("_bias"):
                parts = [linear.bias.data for linear in linears]
            else:
                parts = [linear.weight.data.T if fused.is_transposed else linear.weight.data for linear in linears]
            parameter.data = torch.stack(parts)  # not in place: the old values may be mapped from a file
            fused._parameters[name] = parameter
        del fused.whole, fused.forward
    return module


def forward(
    fused: nn.Module,
    hidden: Float[Tensor, "tokens hidden"],
    chosen: Int64[Tensor, "tokens k"],
    scores: Float[Tensor, "tokens k"],
) -> Float[Tensor, "tokens hidden"]:
    """Run every expert on the tokens that chose it; one that none chose is called with none."""
    output = torch.zeros_like(hidden)
    for index in range(len(fused.whole["down_proj"])):
        expert = fused.get_submodule(str(index))
        token, place = torch.where(chosen == index)
        up = expert["up"](hidden[token])
        answer = expert["down"](fused._apply_gate(up) if fused.has_gate else fused.act_fn(up))
        if fused.has_post_expert_norm:
            answer = fused.post_expert_norm(answer)
        answer = answer * scores[token, place, None]
        output.index_add_(0, token, answer.to(output.dtype))
    return output
