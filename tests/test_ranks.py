"""Two ranks prune and evaluate as one process does. torchrun starts this file, too: `__main__` is what a rank runs."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_decoder import build

import besa
from besa.machine.processes import joined, n_ranks, rank
from besa.reconstruct import Reconstruct

STEPS = {"batch_size": 2, "epochs": 4}
CASES = {
    "sparsegpt": (besa.SparseGPT(), None),
    "besa": (besa.Besa(**STEPS, importance="sparsegpt"), None),
    "clipping": (besa.Besa(**STEPS, quantize=besa.Quantize(bits=4)), None),
    "exact budget": (besa.Besa(**STEPS, budget="exact", scores=False), None),
    "scores": (besa.Besa(**STEPS, budget="exact"), None),
    "scope model": (besa.Besa(**STEPS, budget="exact", scope="model"), None),
    "closed form": (besa.Wanda(), Reconstruct("closed")),
}
TRAINED = besa.Wanda(), Reconstruct("block", lr=2e-4, held_out=0.25)
WINDOWS = torch.randint(0, 96, (16, 24), generator=torch.Generator().manual_seed(1))


def pruned(method, reconstruct, windows):
    """What pruning leaves of the tiny model: tensors by name, and what its report tells that is of all windows."""
    model = build("Llama")
    report = besa.prune(model, windows, method, progress=False, reconstruct=reconstruct)
    masks = {f"{index}.{name}": keep_mask for (index, name), keep_mask in report.keep_masks.items()}
    return model.state_dict() | masks, [report.steps, [(row["block_error"], row["note"]) for row in report.rows]]


def perplexities():
    """Of five segments, and what is said where the second's has no finite loss."""
    model, tokens = build("Llama"), WINDOWS[:, :20].flatten()
    value = besa.perplexity(model, tokens, 64, progress=False)
    model.get_input_embeddings().weight.data[96], tokens[64] = torch.nan, 96
    with pytest.raises(ValueError) as refused:
        besa.perplexity(model, tokens, 64, progress=False)
    return float(value), value.losses.tolist(), str(refused.value)


def bars():
    """What is shown of work whose bars nobody turned off."""
    model = build("Llama")
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        besa.prune(model, WINDOWS, besa.Besa(**STEPS, budget="exact", scope="model"))
        besa.perplexity(model, WINDOWS[:, :20].flatten(), 64)
    return shown.getvalue()


if __name__ == "__main__":
    with joined():
        assert n_ranks() == 2
        found = {name: pruned(*case, WINDOWS[:2]) for name, case in CASES.items()}
        found |= {"trained": pruned(*TRAINED, WINDOWS), "perplexities": perplexities(), "bars": bars()}
        torch.save(found, Path(sys.argv[1]) / f"{rank()}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks has found."""
    folder = tmp_path_factory.mktemp("ranks")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([*start, __file__, folder], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"{number}.pt") for number in range(2)]


def assert_same(outcome, other):
    assert outcome[1] == other[1] and outcome[0].keys() == other[0].keys()
    for name, tensor in outcome[0].items():
        assert torch.equal(tensor, other[0][name]), name


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_come_to_the_weights_of_one_process_to_the_bit(ranks, name):
    """Of two windows: a sum of two is rounded alike in any order."""
    one = pruned(*CASES[name], WINDOWS[:2])
    for found in ranks:
        assert_same(found[name], one)


def test_two_ranks_train_a_block_together(ranks):
    assert_same(ranks[0]["trained"], ranks[1]["trained"])
    (_, (_, rows)), (_, (_, closed)) = ranks[0]["trained"], pruned(besa.Wanda(), Reconstruct(), WINDOWS)
    assert rows[-1][0] < 0.95 * closed[-1][0]


def test_two_ranks_measure_and_refuse_as_one_process(ranks):
    one = perplexities()
    assert ranks[0]["perplexities"] == ranks[1]["perplexities"] == one
    assert one[2].startswith("segment 1: a loss of nan")


def test_one_rank_shows_how_far_all_are(ranks):
    for what in ("sensitivity", "prune", "perplexity"):
        assert [f"{what}:" in found["bars"] for found in ranks] == [True, False]
