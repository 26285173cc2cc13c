"""Mixtures of experts: linear maps of each expert while a block is worked on.

transformers keeps the experts of a block in fused 3-D parameters with one interface (`transformers.integrations.moe`).

    split(block)    expert i gets `nn.Linear` views of them, `i.up` (with the gate, if any) and `i.down`
    join(block)     the fused parameters again, with the values of these
"""

from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


def is_fused(module: nn.Module) -> bool:
    """Check for fused experts with the interface of transformers."""
    return hasattr(module, "is_concatenated") and hasattr(module, "down_proj")


def routers(block: nn.Module) -> set[nn.Module]:
    """Modules that choose experts or weigh them: beside experts, with one matrix of one row, or of one per expert."""
    found = set()
    for parent in block.modules():
        n_experts = {child.num_experts for child in parent.children() if hasattr(child, "is_concatenated")}
        for child in parent.children():
            rows = [len(parameter) for parameter in child.parameters() if parameter.ndim == 2]
            if n_experts and len(rows) == 1 and rows[0] in {1, *n_experts}:
                found |= set(child.modules())
    return found


def linear_views(fused: nn.Module) -> dict[str, nn.Linear]:
    """Linear maps of all experts by name (`3.up`), without a copy."""
    linears = {}
    for index in range(fused.num_experts):
        for source in ("gate_up_proj" if fused.has_gate else "up_proj", "down_proj"):
            weight = getattr(fused, source).data[index]
            state = {"weight": weight.T if fused.is_transposed else weight}
            if fused.has_bias:
                state["bias"] = getattr(fused, f"{source}_bias").data[index]
            linear = nn.Linear(*state["weight"].T.shape, fused.has_bias, device="meta").requires_grad_(False)
            linear.load_state_dict(state, assign=True)
            linears[f"{index}.{source.split('_')[-2]}"] = linear
    return linears


def split(module: nn.Module) -> nn.Module:
    """Replace the fused parameters in a module by linear maps, until `join`."""
    for fused in list(filter(is_fused, module.modules())):
        linears = linear_views(fused)
        fused.whole = dict(fused._parameters)
        fused._parameters.clear()
        for index in range(fused.num_experts):
            fused.add_module(str(index), nn.ModuleDict({kind: linears[f"{index}.{kind}"] for kind in ("up", "down")}))
        fused.forward = partial(forward, fused)
    return module


def join(module: nn.Module) -> nn.Module:
    """Put the values of the linear maps into the fused parameters, and these into their place."""
    for fused in [each for each in module.modules() if "whole" in vars(each)]:
        experts = [fused._modules.pop(str(index)) for index in range(fused.num_experts)]
        for name, parameter in fused.whole.items():
            kind = ("down" if name.startswith("down") else "up") + (".bias" if name.endswith("_bias") else ".weight")
            parts = [expert.get_parameter(kind).detach() for expert in experts]
            parameter.data = torch.stack([part.T if fused.is_transposed and part.ndim == 2 else part for part in parts])
        fused._parameters.update(fused.whole)
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
    for index in range(fused.num_experts):
        expert = fused.get_submodule(str(index))
        token, place = torch.where(chosen == index)
        up = expert["up"](hidden[token])
        answer = expert["down"](fused._apply_gate(up) if fused.has_gate else fused.act_fn(up))
        if fused.has_post_expert_norm:
            answer = fused.post_expert_norm(answer)
        output.index_add_(0, token, (answer * scores[token, place, None]).to(output.dtype))
    return output
