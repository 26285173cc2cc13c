"""Find the blocks and projections of any Hugging Face decoder, and run its blocks one at a time.

No argument of a block is named here: the calls that the model makes are recorded once and replayed verbatim.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from besa.experts import is_fused, linear_views, routers
from besa.system import deterministic

Hidden = Float[Tensor, "batch seq_len hidden"]


@dataclass(frozen=True)
class BlockCall:
    """Arguments that the model passes to a block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_tuple: bool = False
    """Whether the block returns a tuple; families differ."""

    def to(self, device: torch.device) -> "BlockCall":
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(device), (self.args, self.kwargs))
        return BlockCall(args, kwargs, self.in_tuple)

    def answer(self, hidden: Tensor) -> Any:
        """Hidden states in the form that the block returns."""
        return (hidden,) if self.in_tuple else hidden


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a model, in order."""
    n_blocks = model.config.get_text_config().num_hidden_layers
    unsplittable = set(model._no_split_modules or [])
    for module in model.modules():
        is_known = {type(child).__name__ for child in module.children()} <= unsplittable
        if isinstance(module, nn.ModuleList) and len(module) == n_blocks and is_known:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {n_blocks} blocks of a class in {sorted(unsplittable)}")


def projections(block: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps of a block by their name in it (`self_attn.q_proj`), without routers."""
    linears = {}
    passed = routers(block)
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and module not in passed:
            linears[name] = module
        if is_fused(module):
            linears |= {f"{name}.{inner}": linear for inner, linear in linear_views(module).items()}
    return linears


def pruned_projections(model: PreTrainedModel, ignore: Sequence[str] = ()) -> dict[tuple[int, str], nn.Linear]:
    """The projections of all blocks by (block, name), without the ignored ones.

    Args:
        ignore: names such as "3" (a block), "3.self_attn" or "3.mlp.down_proj", or regular expressions that match one.
    """
    pruned = {}
    known = []
    unused = set(ignore)
    for entry in ignore:
        try:
            re.compile(entry)
        except re.error as error:
            raise ValueError(f"ignore {entry!r} is no regular expression ({error}); write '.*' for any text") from None
    for index, block in enumerate(find_blocks(model)):
        for name, linear in projections(block).items():
            full_name = f"{index}.{name}"
            matches = [entry for entry in ignore if re.fullmatch(rf"(?:{entry})(\..*)?", full_name)]
            unused -= set(matches)
            known.append(full_name)
            if not matches:
                pruned[index, name] = linear
    if unused:
        raise ValueError(f"ignore {sorted(unused)[0]!r} matches no projection; names look like {known[-1]!r}")
    if not pruned:
        raise ValueError(f"ignore {list(ignore)} leaves nothing to prune")
    return pruned


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model whose projections cannot be pruned, before any work."""
    owners: dict[int, str] = {}
    for index, block in enumerate(find_blocks(model)):
        for name, module in block.named_modules():
            problem = None if module in routers(block) else _problem(module)
            full_name = f"block {index}, {name}"
            if isinstance(module, nn.Linear) and problem is None:
                owner = owners.setdefault(id(module.weight), full_name)
                problem = None if owner == full_name else f"its weight is shared with {owner}; untie them first"
            if problem:
                raise ValueError(f"{full_name}: {problem}")


def _problem(module: nn.Module) -> str | None:
    """Why the weights of a module, without its submodules, cannot be pruned or passed over."""
    kind = type(module).__name__
    if any(base.__module__.startswith("peft.") for base in type(module).__mro__):
        return "merge the adapters first: model.merge_and_unload()"
    if parametrize.is_parametrized(module) or (isinstance(module, nn.Linear) and "weight" not in module._parameters):
        return "its weight is computed from other tensors at each call; remove the parametrization first"
    if hasattr(module, "in_features") and not isinstance(module, nn.Linear):
        return f"a {kind} is not a torch.nn.Linear; load the model in its dense form"
    for parameter in module.parameters(recurse=False):
        if parameter.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"weights of {parameter.dtype}; load the model in bfloat16, float16 or float32"
        if parameter.ndim >= 2 and not isinstance(module, nn.Linear) and not is_fused(module):
            return f"a {kind} is not a torch.nn.Linear, nor experts in the form of transformers.integrations.moe"
    return None


def check_tokens(model: PreTrainedModel, tokens: Int64[Tensor, "..."], seq_len: int) -> None:
    """Refuse sequences beyond the model's context and token ids beyond its vocabulary."""
    if not 2 <= seq_len <= context_of(model):
        raise ValueError(f"seq_len {seq_len} is outside [2, {context_of(model)}], the model's context")
    n_ids = vocabulary_of(model)
    if not tokens.numel() or tokens.min() < 0 or tokens.max() >= n_ids:
        raise ValueError(f"no token ids, or ids outside the vocabulary of {n_ids}: was another tokenizer used?")


def vocabulary_of(model: PreTrainedModel) -> int:
    return len(model.get_input_embeddings().weight)  # pyright: ignore[reportArgumentType]


def context_of(model: PreTrainedModel) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


@torch.no_grad()
def record_calls(model: PreTrainedModel, windows: Int64[Tensor, "batch seq_len"]) -> list[BlockCall]:
    """Record how the model calls each block for windows of this number and length."""
    blocks = find_blocks(model)
    name = type(model).__name__
    calls: list[BlockCall] = []
    in_tuple = isinstance(_at_first_block(model, windows[:1, :2], blocks[0].forward), tuple)
    last_hidden = torch.empty(0)

    def stub(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal last_hidden
        if index > 0 and not torch.equal(hidden, last_hidden.to(hidden.device)):
            raise ValueError(f"{name} changes the hidden states between blocks {index - 1} and {index}: not supported")
        last_hidden = hidden
        calls.append(BlockCall(args, kwargs, in_tuple))
        return calls[-1].answer(hidden)

    other_windows = (windows + 1) % vocabulary_of(model)
    with _stubbed(model, stub):
        for tokens in (windows, other_windows):
            model.base_model(tokens.to(model.device), use_cache=False)
    if len(calls) != 2 * len(blocks):
        raise ValueError(f"{name} made {len(calls) / 2:g} calls to its {len(blocks)} blocks: not supported")
    if not all(map(_equal_calls, calls[: len(blocks)], calls[len(blocks) :])):
        raise ValueError(f"{name} passes token-dependent arguments to its blocks: not supported")
    return calls[: len(blocks)]


def _equal_calls(call: BlockCall, other: BlockCall) -> bool:
    leaves = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
    others = [leaf for leaf in tree_leaves((other.args, other.kwargs)) if isinstance(leaf, Tensor)]
    return len(leaves) == len(others) and all(map(torch.equal, leaves, others))


class Stopped(Exception):
    """Stops a model or a block; holds the hidden states."""


@torch.no_grad()
def embed(model: PreTrainedModel, windows: Int64[Tensor, "batch seq_len"]) -> Hidden:
    """The hidden states that enter the first block."""
    return _at_first_block(model, windows, lambda hidden, *_, **__: hidden)


def _at_first_block(model: PreTrainedModel, tokens: Int64[Tensor, "batch seq_len"], answer: Callable[..., Any]) -> Any:
    """Run the model up to its first block, and `answer` with that block's arguments."""

    def stub(index: int, *args: Any, **kwargs: Any) -> Any:
        raise Stopped(answer(*args, **kwargs))

    with _stubbed(model, stub):
        try:
            model.base_model(tokens.to(model.device), use_cache=False)
        except Stopped as stopped:
            return stopped.args[0]
    raise ValueError(f"{type(model).__name__} did not call its first block: not supported")


@contextlib.contextmanager
def _stubbed(model: PreTrainedModel, stub: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of every block by `stub(index, hidden, ...)`."""
    blocks = find_blocks(model)
    instance_forwards = [block.__dict__.get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        block.forward = functools.partial(stub, index)
    try:
        with deterministic(False):  # OPT counts positions by a cumulative sum, for which CUDA has no such algorithm
            yield
    finally:
        for block, forward in zip(blocks, instance_forwards, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def run_block(block: nn.Module, hidden: Hidden, call: BlockCall, weights: dict[str, Tensor] | None = None) -> Hidden:
    """Output hidden states of a block.

    Args:
        weights: replace the weights of some projections, by name, for this call.
    """
    parameters = {f"{name}.weight": weight for name, weight in (weights or {}).items()}
    output = torch.func.functional_call(block, parameters, (hidden, *call.args), call.kwargs)
    return output[0] if call.in_tuple else output


def run_head(
    model: PreTrainedModel, hidden: Float[Tensor, "batch n hidden"], call: BlockCall
) -> Float[Tensor, "batch n vocab"]:
    """Logits from the last block's output, through the model's own norm, head and softcap."""
    with _stubbed(model, lambda index, _, *args, **kwargs: call.answer(hidden)):
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        return model(tokens, use_cache=False).logits
