"""Memory of a GPU and waits for it, counted on torch's device "meta" for one block of random weights.

`python tests/test_gpu_count.py` writes reproduce/gpu.csv.
"""

import traceback
import weakref
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import besa
from besa.decoder import BlockCall, _at_first_block, find_blocks
from besa.walk import Block
from reproduce.analysis import SHAPES

N_WINDOWS = 8
METHODS = {
    "wanda": besa.Wanda(),
    "sparsegpt": besa.SparseGPT(),
    "besa-row-wise": besa.Besa(),
    "joint-besa": besa.Besa(quantize=besa.Quantize()),
    "exact": besa.Exact(),
    "exact-update": besa.Exact(update=True),
    "closed": besa.Closed(),
}


class GPU(TorchDispatchMode):
    """Count live bytes, and by source line the waits for a value and the copies between devices."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.waits, self.copies, self.known = 0, 0, Counter(), Counter(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            self.waits[source()] += 1
            return {torch.bool: True, torch.int32: 0}.get(args[0].dtype, 1)  # "all are finite", "nothing failed"
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            self.waits[source()] += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        outputs = func(*args, **kwargs)
        devices = {tensor.device.type for tensor in tree_leaves((args, outputs)) if isinstance(tensor, torch.Tensor)}
        self.copies[source()] += len(devices) > 1 and func.overloadpacket in (
            torch.ops.aten._to_copy,
            torch.ops.aten.copy_,
        )
        self.track(outputs)
        return outputs

    def track(self, tensors):
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)

    def free(self, key, size):
        self.known.discard(key)
        self.live -= size


CALLERS = ("/besa/", "/prodigyopt/", "/torch/optim/")


def source():
    """File and line of besa, or of the optimizer that it calls."""
    frames = [frame for frame in traceback.extract_stack() if any(part in frame.filename for part in CALLERS)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def count(shape, method, monkeypatch):
    """Observe, prune and finish a block."""
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, fused=None, **options: ADAM(*args, **options))
    with torch.device("meta"):
        config = LlamaConfig(**SHAPES[shape], num_hidden_layers=1, max_position_embeddings=4096)
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
        tokens = torch.zeros(1, 2048, dtype=torch.int64)
        inputs = torch.empty(N_WINDOWS, 2048, config.hidden_size, dtype=torch.bfloat16)
    with GPU() as gpu, torch.no_grad():
        call = _at_first_block(model, tokens, lambda hidden, *args, **kwargs: BlockCall(args, kwargs))
        dense = inputs.clone() if method.match == "model" else None
        block = Block(0, find_blocks(model)[0], call, inputs, dense, frozenset(), N_WINDOWS, None)
        del inputs, dense
        gpu.track([block.inputs, list(block.module.parameters())])
        gpu.peak = gpu.live
        block.observe(method.match, method.needs_hessian)
        block.finish(method.prune_block(block))
    return gpu


ADAM = torch.optim.Adam


@pytest.mark.parametrize(
    "name, per_window", [("besa-row-wise", 0), ("joint-besa", 0), ("exact", 1), ("exact-update", 1)]
)
def test_a_step_waits_for_the_gpu_in_few_places(name, per_window, monkeypatch):
    gpu = count("smollm2-135m", METHODS[name], monkeypatch)
    ours = {place: n for place, n in gpu.waits.items() if "/besa/" in place and n >= N_WINDOWS}
    assert len(ours) == per_window and all(n <= N_WINDOWS + 1 for n in ours.values()), gpu.waits
    assert not [place for place, n in gpu.copies.items() if n >= N_WINDOWS], gpu.copies


if __name__ == "__main__":
    path = Path(__file__).parents[1] / "reproduce" / "gpu.csv"
    estimates = pd.read_csv(path, index_col=["block", "method"])["estimated ms/window"]
    rows = []
    for shape in ("llama-7b", "llama2-70b"):
        for name, method in METHODS.items():
            with pytest.MonkeyPatch.context() as monkeypatch:
                gpu = count(shape, method, monkeypatch)
            places = sum(n >= N_WINDOWS for n in gpu.waits.values()) if method.batch_size else ""
            rows.append(
                {"block": shape, "method": name, "counted GB": round(gpu.peak / 1e9, 1), "waits/window": places}
            )
            print(rows[-1], gpu.waits.most_common(5), flush=True)
    table = pd.DataFrame(rows).set_index(["block", "method"]).join(estimates)
    table.to_csv(path)
