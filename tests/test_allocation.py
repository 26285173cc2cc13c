import importlib
import sys

import numpy as np
import pytest
import torch

import besa
from besa import kernels, packed_kernels
from besa.allocation import Allocation, candidate_counts, candidate_rates, rank_rows, reachable_sparsity, simplex
from besa.machine import threads


def straight_through(weight, importance, logits, smooth):
    """The paper's Eqn. 3-6 with the full probability matrix and torch's own gradient."""
    rates = candidate_rates(logits.shape[1])
    rows, columns = weight.shape
    beta = simplex(logits, smooth).repeat_interleave(rows // len(logits), 0)  # (rows, n)
    ranks = importance.argsort(dim=1, stable=True).argsort(dim=1)
    counts = torch.tensor([int(columns * rate) for rate in rates.tolist()])
    probability = torch.stack([(beta * (counts > rank)).sum(1) for rank in range(columns)], 1).gather(1, ranks)
    keep = (ranks >= (beta @ rates * columns).long()[:, None]).float()
    return weight * (keep - (1 - probability).detach() + (1 - probability))


@pytest.mark.parametrize("groups, n, smooth", [(12, 101, True), (12, 101, False), (4, 11, True), (1, 256, True)])
def test_gradient_equals_autograd_through_the_probability_matrix(groups, n, smooth):
    torch.manual_seed(groups + n)
    weight, scores, grad = torch.randn(3, 12, 40)
    logits = torch.randn(groups, n, requires_grad=True)
    masked, _ = Allocation.create(weight, scores, candidate_rates(n), smooth)(logits)
    expected = straight_through(weight, scores, logits, smooth)
    torch.testing.assert_close(masked, expected)
    (ours,) = torch.autograd.grad((masked * grad).sum(), logits)
    (theirs,) = torch.autograd.grad((expected * grad).sum(), logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("openmp", [True, False])
def test_every_row_is_passed_over_once_by_several_threads_and_an_error_comes_back(openmp, monkeypatch):
    pytest.importorskip("numba")

    def count(first, last, rows, firsts):
        if last > len(rows):
            raise MemoryError
        for row in range(first, last):
            rows[row] += 1
            firsts[row] = first

    kernel = threads.in_threads(count)
    if not openmp:
        monkeypatch.setattr(threads.ctypes, "CDLL", lambda _: object())
    threads._team.cache_clear()
    n_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        rows, firsts = torch.zeros(2, 1001).numpy()
        threads.over_rows(kernel, len(rows), rows, firsts, work=2**30)
        assert (rows == 1).all()
        assert sorted(np.unique(firsts, return_counts=True)[1]) == [333, 334, 334]
        with pytest.raises(MemoryError, match="2000 rows"):
            threads.over_rows(kernel, 2000, rows, firsts, work=2**30)
    finally:
        torch.set_num_threads(n_threads)
        threads._team.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_equal_plain_torch(dtype, monkeypatch):
    pytest.importorskip("numba")
    torch.manual_seed(0)
    weight, grad = torch.randn(2, 17, 300).to(dtype)
    ranking = rank_rows(torch.rand(17, 300), candidate_counts(candidate_rates(101), 300))
    counts = torch.randint(0, 301, (17,))
    compiled = kernels.masked_rows(weight, ranking.ranks, counts, torch.empty_like(weight))
    sums = kernels.bucket_sums(grad, weight, ranking, 101)
    monkeypatch.setattr(kernels, "numba", None)
    assert torch.equal(compiled, kernels.masked_rows(weight, ranking.ranks, counts, torch.empty_like(weight)))
    torch.testing.assert_close(sums, kernels.bucket_sums(grad, weight, ranking, 101), rtol=1e-5, atol=1e-5)


def test_kernels_are_there_where_numba_is_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    for module, package in ((threads, besa.machine), (kernels, besa), (packed_kernels, besa)):
        monkeypatch.delitem(sys.modules, module.__name__)
        monkeypatch.setattr(package, module.__name__.rpartition(".")[2], module)  # put back behind this test
    plain, weight = importlib.import_module("besa.kernels"), torch.ones(2, 3)
    assert plain is not kernels and plain.numba is None and importlib.import_module("besa.packed_kernels").numba is None
    masked = plain.masked_rows(weight, torch.arange(3).repeat(2, 1), torch.tensor([0, 2]), torch.empty_like(weight))
    assert masked.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_where_no_folder_can_be_written_kernels_are_compiled_for_the_process_alone(monkeypatch):
    numba = pytest.importorskip("numba")
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(straight_through)
    assert threads.compiled(lambda x: x + 1)(2) == 3


def test_a_compiled_update_of_sparsegpt_is_plain_torchs_to_the_bit(monkeypatch):
    pytest.importorskip("numba")
    torch.manual_seed(0)
    keep, upper, columns = torch.rand(33, 50) < 0.5, torch.rand(50, 50).triu() + torch.eye(50), range(4, 20)
    updated = []
    for compiler in (kernels.numba, None):
        monkeypatch.setattr(kernels, "numba", compiler)
        weight, errors = torch.ones(33, 50).cumsum(dim=1) / 7, torch.zeros(33, 50)
        kernels.spread_errors(weight, keep, upper, errors, columns)
        updated.append((weight, errors))
    assert all(map(torch.equal, *updated))
    assert updated[0][1][:, 4:20].ne(0).any() and not updated[0][1][:, [3, 20]].any()


@pytest.mark.parametrize("columns", [1, 40, 33000])
def test_ranks_order_each_row_and_buckets_name_the_last_pruning_candidate(columns):
    torch.manual_seed(columns)
    scores = torch.rand(3, columns)
    counts = candidate_counts(candidate_rates(101), columns)
    ranking = rank_rows(scores, counts)
    ordered = torch.empty_like(scores).scatter_(1, ranking.ranks.long(), scores)
    assert (ordered.diff(dim=1) >= 0).all()
    assert ranking.ranks.dtype == (torch.int32 if columns == 33000 else torch.int16)
    bucket, rank = ranking.buckets.long(), ranking.ranks.long()
    assert (counts[bucket] > rank).all() and (counts[bucket + 1] <= rank).all()


def test_reachable_sparsity_is_what_extreme_logits_reach():
    rates = candidate_rates(101)
    best = max(float(simplex(torch.where(rates >= cut, 40.0, -40.0), smooth=True) @ rates) for cut in rates)
    lowest, highest = reachable_sparsity(101, smooth=True)
    assert highest == pytest.approx(best, abs=1e-6) and lowest == pytest.approx(1 - best, abs=1e-6)
    assert (round(lowest, 3), round(highest, 3)) == (0.376, 0.624)
