"""Find the blocks and projections of any decoder, record what every block is called with, run one block.

Nothing here names an argument of a block: the calls that the model makes are recorded once and replayed verbatim.
"""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from besa.machine.device import deterministic


@dataclass(frozen=True)
class BlockCall:
    """What the model passes to a block beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_tuple: bool = False
    """Whether the block answers with a tuple, which differs between families."""

    def to(self, device: torch.device) -> "BlockCall":
        """The same with every tensor on a device."""
        move = lambda value: value.to(device) if isinstance(value, Tensor | BlockCall) else value
        return BlockCall(tree_map(move, self.args), tree_map(move, self.kwargs), self.in_tuple)

    def answer(self, hidden: Tensor) -> Any:
        """Hidden states in the form in which the block answers."""
        return (hidden,) if self.in_tuple else hidden


Spans = dict[int, tuple[nn.Module, BlockCall]]
"""Blocks, or spans of blocks that run as one, with their calls, by the index of the first."""


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a model, in order.

    Raises:
        ValueError: no list of `num_hidden_layers` modules of a class that the model declares unsplittable.
    """
    n_blocks = model.config.get_text_config().num_hidden_layers
    unsplittable = set(model._no_split_modules or [])
    for module in model.modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) == n_blocks
        if is_list and {type(block).__name__ for block in module} <= unsplittable:
            return module
    raise ValueError(
        f"{type(model).__name__} has no list of {n_blocks} blocks of a class in {sorted(unsplittable)}: "
        "not a decoder that besa knows how to walk through"
    )


def projections(block: nn.Module) -> dict[str, nn.Linear]:
    """The prunable linear maps of a block by their name in it (`self_attn.q_proj`); weights are (rows, columns)."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def pruned_projections(model: PreTrainedModel, ignore: Sequence[str] = ()) -> dict[tuple[int, str], nn.Linear]:
    """The projections of all blocks by block and name, but for those that stay dense.

    Args:
        ignore: names as the model has them (`model.layers.3.mlp.down_proj`), without what comes before the block's
            number (`3.mlp.down_proj`) or without the block (`mlp.down_proj`), of projections or of what holds them
            (`3.mlp`, `3`); or "re:" and a regular expression, matched from the start of the name in the model, as in
            llm-compressor (`re:.*down_proj`).

    Raises:
        ValueError: an entry names no linear map of the model, or nothing is left.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    every = {
        (i, name): linear for i, block in enumerate(find_blocks(model)) for name, linear in projections(block).items()
    }
    names = {key: (paths[id(linear)], f"{key[0]}.{key[1]}", key[1]) for key, linear in every.items()}
    # lm_head is never pruned: naming it, as llm-compressor's users do, is no mistake.
    elsewhere = [(path,) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    left = set(every)
    for entry in ignore:
        left -= {key for key, known in names.items() if _matches(entry, known)}
        if not any(_matches(entry, known) for known in [*names.values(), *elsewhere]):
            example = names[next(iter(names))]
            raise ValueError(f"ignore {entry!r} names no projection; there are {', '.join(example)}, ...")
    if not left:
        raise ValueError(f"ignore {list(ignore)} leaves no projection to prune; name fewer")
    return {key: linear for key, linear in every.items() if key in left}


def _matches(entry: str, names: tuple[str, ...]) -> bool:
    """Whether an entry of `ignore` names a projection, whose name in the model comes first."""
    if not entry.startswith("re:"):
        return any(f"{name}.".startswith(f"{entry}.") for name in names)
    try:
        return re.match(entry.removeprefix("re:"), names[0]) is not None
    except re.error as error:
        raise ValueError(f"ignore {entry!r} is no regular expression ({error}); write 're:.*down_proj'") from error


def weight_of(projection: nn.Linear) -> Float[Tensor, "rows columns"]:
    """A projection's weight, to read; where the model is larger than the GPU (`load_model`) a copy, fetched for it."""
    with align_module_device(projection):
        return projection.weight.detach()


def check_model(model: PreTrainedModel, values: bool = True) -> None:
    """Refuse what cannot be pruned, before any work.

    Args:
        values: look at the weights too, which reads all of them; without, they may be on the meta device.

    Raises:
        ValueError: a block or projection that is quantized, not finite or (with `values`) on the meta device, not a
            Linear, part of a mixture of experts, or whose weight is made of others (adapters, weight normalization,
            torch's own pruning) or is that of another one; the message names it. Or the model is compiled,
            or the call stands in `torch.inference_mode()`.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("nothing can be learned within torch.inference_mode(); call it outside, or in no_grad()")
    if _is_peft(model):
        raise ValueError(f"a {type(model).__name__} of peft hides its projections; merge it: model.merge_and_unload()")
    if any(module._compiled_call_impl for module in model.modules()):
        raise ValueError(
            "a compiled model does not show what enters its projections; load it again, and compile it afterwards"
        )
    owners: dict[int, str] = {}
    for index, block in enumerate(find_blocks(model)):
        for name, module in block.named_modules():
            wrapper = _wrapper(module) or _no_linear(module)
            if wrapper:
                raise ValueError(f"block {index}, {name}: {wrapper}")
        for name, linear in projections(block).items():
            owner = owners.setdefault(id(linear.weight), f"block {index}, {name}")
            if owner != f"block {index}, {name}":
                raise ValueError(
                    f"block {index}, {name}: its weight is that of {owner}, and one of them would undo what the other "
                    "prunes; untie them: module.weight = torch.nn.Parameter(module.weight.clone())"
                )
        # Fused experts first: the router beside them would be named instead.
        for name, parameter in sorted(block.named_parameters(), key=lambda item: -item[1].ndim):
            problem = _problem(block, name, parameter, values)
            if problem:
                raise ValueError(f"block {index}, {name}: {problem}")
        if not projections(block):
            raise ValueError(f"block {index} has no torch.nn.Linear to prune")


def _is_peft(module: nn.Module) -> bool:
    """Whether a class of peft is what this is, or is derived from; peft itself is slow to import."""
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def _wrapper(module: nn.Module) -> str | None:
    """What makes a module's weight anew from other tensors, so that zeros in it would not last, and the way out."""
    if _is_peft(module):
        return f"a {type(module).__name__} of peft; merge it first: model = model.merge_and_unload()"
    if parametrize.is_parametrized(module):
        name = next(iter(module.parametrizations))
        return f"its {name} is parametrized; first torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
    if isinstance(module, nn.Linear) and "weight" not in module._parameters:
        made_of = ", ".join(name for name, _ in module.named_parameters() if name.startswith("weight"))
        return (
            f"its weight is made of {made_of} in every forward; first torch.nn.utils.prune.remove(module, 'weight') "
            "or torch.nn.utils.remove_weight_norm(module)"
        )
    return None


def _no_linear(module: nn.Module) -> str | None:
    """What keeps a projection in another form than a `torch.nn.Linear`, which would be passed over, and the way out."""
    if isinstance(module, nn.Linear) or not hasattr(module, "in_features"):
        return None
    way_out = "a packed model becomes dense by besa.unpack(model) or besa.load_model(..., packed=False)"
    return f"a {type(module).__name__} is not a torch.nn.Linear as besa wants it; {way_out}"


def _problem(block: nn.Module, name: str, parameter: nn.Parameter, values: bool) -> str | None:
    owner = block.get_submodule(name.rpartition(".")[0])
    if values and parameter.is_meta:
        return "the weights are not in memory (meta device); `besa.prune_checkpoint` takes the model by its name"
    if parameter.is_inference():
        return "its weights were made within torch.inference_mode(); load the model outside"
    if parameter.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        kind = "quantized weights" if parameter.element_size() < 2 else "weights"
        return f"{kind} ({parameter.dtype}); load the model in bfloat16, float16 or float32"
    if parameter.ndim > 2:
        return f"a parameter of shape {tuple(parameter.shape)}: mixture-of-experts and convolutions are not supported"
    if parameter.ndim == 2 and not isinstance(owner, nn.Linear):
        return f"a {type(owner).__name__} is not a torch.nn.Linear and cannot be pruned; convert it first"
    if values and not torch.isfinite(parameter).all():
        return "the weights hold NaN or infinity"
    return None


def check_tokens(model: PreTrainedModel, tokens: Int64[Tensor, "..."], seq_len: int) -> None:
    """Refuse token ids that the model cannot take, before any work.

    Raises:
        ValueError: not int64, empty, sequences shorter than 2 or longer than the model's context, unknown ids.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        kind = f"a {type(tokens).__name__} of {getattr(tokens, 'dtype', 'no dtype')}"
        raise ValueError(f"token ids must be int64 in a torch tensor, not {kind}; take torch.as_tensor(ids).long()")
    context = context_of(model)
    if not 2 <= seq_len <= context:
        raise ValueError(f"seq_len {seq_len} is outside [2, {context}], what the model's context allows")
    if not tokens.numel():
        raise ValueError(f"no token ids: shape {tuple(tokens.shape)}")
    n_ids = model.get_input_embeddings().num_embeddings
    if tokens.min() < 0 or tokens.max() >= n_ids:
        raise ValueError(
            f"token ids from {int(tokens.min())} to {int(tokens.max())}, but the vocabulary has {n_ids}: "
            "were they made with another model's tokenizer?"
        )


def context_of(model: PreTrainedModel) -> int:
    """Tokens that the model can place."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


@torch.no_grad()
def record_calls(model: PreTrainedModel, windows: Int64[Tensor, "batch seq_len"]) -> list[BlockCall]:
    """How the model calls each of its blocks for windows; it depends on their number and length, not on their tokens.

    Raises:
        ValueError: the model did not call every block once, or calls them otherwise for other tokens.
    """
    blocks = find_blocks(model)
    calls: list[BlockCall] = []
    run_first = blocks[0].forward

    def stub(index: int, hidden: Tensor, *args, **kwargs):
        # The first block is run, to find out whether blocks answer with a tuple.
        in_tuple = calls[0].in_tuple if calls else isinstance(run_first(hidden, *args, **kwargs), tuple)
        calls.append(BlockCall(args, kwargs, in_tuple))
        return calls[-1].answer(hidden)

    others = (windows + 1) % model.get_input_embeddings().num_embeddings
    with _without_blocks(model, stub):
        # First a single token: the model may lie on a CPU, which would run a large block for long.
        for tokens in (windows[:1, :1], windows, others):
            model.base_model(tokens.to(model.device), use_cache=False)
    if len(calls) != 3 * len(blocks):
        made = f"{len(calls) / 3:g} calls to its {len(blocks)} blocks"
        raise ValueError(f"{type(model).__name__} made {made}: not supported")
    calls, again = calls[len(blocks) : 2 * len(blocks)], calls[2 * len(blocks) :]
    if not all(map(_same, calls, again)):
        raise ValueError(
            f"{type(model).__name__} hands its blocks more than hidden states of the tokens: not supported"
        )
    return calls


def _same(call: BlockCall, other: BlockCall) -> bool:
    """Whether two calls agree beside the hidden states; never with a cache that blocks write into."""
    leaves = [tree_leaves((each.args, each.kwargs)) for each in (call, other)]
    if any(isinstance(leaf, dict) for leaf in leaves[0]):
        return False
    mine, theirs = ([leaf for leaf in of if isinstance(leaf, Tensor)] for of in leaves)
    return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


class _Entered(Exception):
    """A run has come to where it is to stop; holds what enters there."""


@torch.no_grad()
def embed(model: PreTrainedModel, windows: Int64[Tensor, "batch seq_len"]) -> Float[Tensor, "batch seq_len hidden"]:
    """The hidden states that enter the first block, where the model is stopped."""

    def stub(index: int, hidden: Tensor, *args, **kwargs):
        raise _Entered(hidden)

    with _without_blocks(model, stub):
        try:
            model.base_model(windows.to(model.device), use_cache=False)
        except _Entered as entered:
            return entered.args[0]
    raise ValueError(f"{type(model).__name__} did not call its first block: not supported")


@contextlib.contextmanager
def _stubbed(blocks: Iterable[nn.Module], stub: Callable[..., Any]) -> Iterator[None]:
    """Replace every block's forward by `stub(index, hidden, ...)` for a while."""
    own = [block.__dict__.get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        block.forward = functools.partial(stub, index)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


@contextlib.contextmanager
def _without_blocks(model: PreTrainedModel, stub: Callable[..., Any]) -> Iterator[None]:
    """Every block stubbed for a while, and what is left of the model free to use any algorithm.

    Of the cumulative sum by which OPT counts its positions, a GPU has none that torch calls deterministic.
    """
    with _stubbed(find_blocks(model), stub), deterministic(False):
        yield


class Span(nn.ModuleList):
    """Consecutive blocks that run as one; their projections are named `0.self_attn.q_proj`, ..."""

    def forward(self, hidden: Tensor, calls: list[BlockCall]) -> Tensor:
        for block, call in zip(self, calls, strict=True):
            hidden = run_block(block, hidden, call)
        return hidden


def spans(blocks: nn.ModuleList, calls: list[BlockCall], size: int) -> Spans:
    """Every `size` blocks as one module with its call, by the first block's index; the last may hold fewer."""
    if size == 1:
        return dict(enumerate(zip(blocks, calls, strict=True)))
    starts = range(0, len(blocks), size)
    return {i: (Span(blocks[i : i + size]), BlockCall((calls[i : i + size],), {})) for i in starts}


def members(index: int, block: nn.Module) -> dict[int, nn.Module]:
    """The blocks of a block or span of blocks that starts at `index`, by their own index."""
    return dict(enumerate(block, index)) if isinstance(block, Span) else {index: block}


def locate(index: int, block: nn.Module, name: str) -> tuple[int, str]:
    """Block and name of a projection that belongs to a block, or to a span of blocks, that starts at `index`."""
    if not isinstance(block, Span):
        return index, name
    offset, _, within = name.partition(".")
    return index + int(offset), within


def device_of(block: nn.Module) -> torch.device:
    """Where a block computes."""
    return next(block.parameters()).device


def to_device_of(block: nn.Module, window: Tensor) -> Tensor:
    """A window of hidden states where the block computes; no copy where it is there already."""
    return window.to(device_of(block), non_blocking=True)


def run_block(
    block: nn.Module,
    hidden: Float[Tensor, "batch seq_len hidden"],
    call: BlockCall,
    weights: dict[str, Tensor] | None = None,
) -> Float[Tensor, "batch seq_len n_out"]:
    """One block's output hidden states, with some projections' weights replaced for this call only.

    The block may be any module that takes its hidden states first: a span of blocks, attention, a projection (whose
    name in itself is empty).
    """
    parameters = {f"{name}.weight".lstrip("."): weight for name, weight in (weights or {}).items()}
    output = torch.func.functional_call(block, parameters, (hidden, *call.args), call.kwargs)
    return output[0] if call.in_tuple else output


@torch.no_grad()
def run_until(
    block: nn.Module,
    name: str,
    hidden: Float[Tensor, "batch seq_len hidden"],
    call: BlockCall,
    weights: dict[str, Tensor] | None,
) -> Float[Tensor, "*batch columns"]:
    """What enters a projection of a block, which is run no further.

    Raises:
        ValueError: the block does not call it.
    """

    def stop(_, inputs: tuple[Tensor, ...]) -> None:
        raise _Entered(inputs[0])

    try:
        with block.get_submodule(name).register_forward_pre_hook(stop):
            run_block(block, hidden, call, weights)
    except _Entered as entered:
        return entered.args[0]
    raise ValueError(f"{name}: never called; conditional projections are not supported")


@torch.no_grad()
def run_past(
    block: nn.Module, name: str, hidden: Float[Tensor, "batch seq_len hidden"], call: BlockCall
) -> tuple[Float[Tensor, "*batch columns"], Float[Tensor, "batch seq_len n_out"]]:
    """What enters a projection of a block, which it calls, and what leaves the block."""
    entered: list[Tensor] = []
    with block.get_submodule(name).register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0])):
        output = run_block(block, hidden, call)
    return entered[0], output


class Remembered:
    """What enters the last projection of a part of a block, as a rule attention's, for each window of a stream.

    With it the part need not run again while the weights before that projection stay. Whether the part puts out just
    what the projection makes of it is tried on the first window; a part that does not runs every time.
    """

    def __init__(self, block: nn.Module, part: str, room: Float[Tensor, "n_samples seq_len hidden"]) -> None:
        """
        Args:
            part: name of a submodule that the block calls once.
            room: for what enters.
        """
        self._block, self._part, self._room = block, block.get_submodule(part), room
        self._names = [f"{part}.{name}" for name in projections(self._part) if name]  # none where it is one itself
        self._last, self._weights = "", {}
        self._in_tuple: int | None = None  # elements of the part's answer, 0 where it is no tuple; None: not tried

    def note(self, number: int, name: str, x: Tensor, weights: dict[str, Tensor]) -> None:
        """This enters a projection of the block with `weights` in it; the last one noted in the part counts."""
        room = self._room[number : number + 1]
        if name in self._names and (x.shape, x.dtype) == (room.shape, room.dtype):
            room.copy_(x)
            self._last, self._weights = name, dict(weights)

    @contextlib.contextmanager
    def of(self, number: int, weights: dict[str, Tensor]) -> Iterator[None]:
        """While active, the part answers for this window by its last projection alone, if what enters that is known."""
        before = [name for name in self._names if name != self._last]
        stubbed = [self._part] if self._last and all(weights.get(n) is self._weights.get(n) for n in before) else []
        with _stubbed(stubbed, functools.partial(self._answer, number, self._part.forward)):
            yield

    def _answer(self, number: int, forward: Callable[..., Any], _: int, *args: Any, **kwargs: Any) -> Any:
        if self._in_tuple is not None:
            hidden = self._put_out(number)
            return (hidden, *[None] * (self._in_tuple - 1)) if self._in_tuple else hidden
        output = forward(*args, **kwargs)
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        if number == 0 and all(more is None for more in rest) and torch.equal(hidden, self._put_out(0)):
            self._in_tuple = len(output) if isinstance(output, tuple) else 0
        return output

    def _put_out(self, number: int) -> Tensor:
        entered = to_device_of(self._part, self._room[number : number + 1])
        return self._block.get_submodule(self._last)(entered)


@torch.no_grad()
def inputs_shared(
    block: nn.Module, hidden: Float[Tensor, "batch seq_len hidden"], call: BlockCall, linear: dict[str, nn.Linear]
) -> list[list[str]]:
    """Names of projections in the order in which the block calls them, those that are fed by one tensor together."""
    seen: dict[int, tuple[Tensor, list[str]]] = {}  # id -> (the tensor, kept alive so that the id stays its own; names)
    note = lambda name: lambda _, inputs: seen.setdefault(id(inputs[0]), (inputs[0], []))[1].append(name)
    with contextlib.ExitStack() as hooks:
        for name, module in linear.items():
            hooks.enter_context(module.register_forward_pre_hook(note(name)))
        run_block(block, hidden, call)
    return [names for _, names in seen.values()]


@torch.no_grad()
def record_part(
    block: nn.Module,
    part: str,
    hidden: Float[Tensor, "n_samples seq_len hidden"],
    call: BlockCall,
    weights: dict[str, Tensor],
) -> tuple[Float[Tensor, "n_samples seq_len n_in"], BlockCall, Float[Tensor, "n_samples seq_len n_out"]]:
    """What enters a part of a block, how the part is called, and what it makes of that with its own weights.

    Args:
        part: name of a submodule that the block calls once.
        weights: of projections outside the part, replaced for these runs.
    """
    module, seen = block.get_submodule(part), []
    signature = inspect.signature(module.forward)

    def hook(_, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        bound = signature.bind(*args, **kwargs)  # the hidden states come first, whatever their name
        rest = BlockCall(bound.args[1:], bound.kwargs, isinstance(output, tuple))
        seen.append((bound.args[0], rest, output[0] if rest.in_tuple else output))

    with module.register_forward_hook(hook, with_kwargs=True):
        for window in hidden.split(1):
            run_block(block, to_device_of(block, window), call, weights)
    inputs, calls, outputs = zip(*seen, strict=True)
    if not all(_same(calls[0], other) for other in calls):
        raise ValueError(f"{part} takes more than hidden states of each window: take reconstruct=1, the whole block")
    # some families flatten windows and tokens inside a block
    stack = lambda parts: torch.stack([part.view(hidden.shape[1], -1) for part in parts])
    return stack(inputs), calls[0], stack(outputs)


@torch.no_grad()
def run_blocks(
    model: PreTrainedModel, tokens: Int64[Tensor, "batch seq_len"], **options: Any
) -> tuple[Float[Tensor, "batch seq_len hidden"], BlockCall]:
    """The hidden states that leave the last block, and a call with which `run_head` takes them.

    Args:
        options: what the model takes beside the tokens, such as its own `attention_mask` and `position_ids`.
    """
    left: list[Any] = []
    with find_blocks(model)[-1].register_forward_hook(lambda _, __, output: left.append(output)):
        model.base_model(tokens.to(model.device), use_cache=False, **options)
    in_tuple = isinstance(left[0], tuple)
    return left[0][0] if in_tuple else left[0], BlockCall((), {}, in_tuple)


def run_head(
    model: PreTrainedModel, hidden: Float[Tensor, "1 n hidden"], call: BlockCall
) -> Float[Tensor, "1 n vocab"]:
    """Logits of hidden states that leave the last block: final norm, head and softcap run as the model has them.

    Args:
        call: of any block of the model.
    """
    stub = lambda index, _, *args, **kwargs: call.answer(hidden)
    with _without_blocks(model, stub):
        return model(torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device), use_cache=False).logits
