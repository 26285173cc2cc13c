import copy
import math

import numpy
import pytest
import torch

import besa
from besa.decoder import projections, weight_of
from besa.evaluate import perplexity as evaluate
from besa.evaluate.perplexity import hidden_state_errors


@pytest.mark.parametrize("seq_len", [24, 64])
@torch.no_grad()
def test_perplexity_equals_the_naive_loop_over_full_logits(tiny_llama, seq_len):
    tokens = torch.randint(0, 97, (200,), generator=torch.Generator().manual_seed(0))
    losses = []
    for start in range(0, 200 - seq_len + 1, seq_len):
        segment = tokens[None, start : start + seq_len]
        logits = tiny_llama(segment).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, segment[0, 1:]))
    expected = math.exp(torch.stack(losses).mean())
    found = besa.perplexity(tiny_llama, tokens, seq_len, progress=False)
    assert found == pytest.approx(expected, rel=1e-5) and isinstance(found, float)
    assert found.losses.tolist() == pytest.approx(torch.stack(losses).tolist(), rel=1e-5)


def test_gemmas_segments_begin_with_its_bos(tiny_llama, monkeypatch):
    tokens = torch.randint(2, 97, (200,), generator=torch.Generator().manual_seed(0))
    begun = tokens.clone()
    begun[::24] = tiny_llama.config.bos_token_id
    as_cut, expected = (besa.perplexity(tiny_llama, each, 24, progress=False) for each in (tokens, begun))
    monkeypatch.setattr(tiny_llama.config, "model_type", "gemma3_text")
    assert besa.perplexity(tiny_llama, tokens, 24, progress=False) == expected != as_cut


def test_perplexity_does_not_depend_on_how_the_head_is_cut(tiny_llama, monkeypatch):
    tokens = torch.arange(64) % 97
    whole = besa.perplexity(tiny_llama, tokens, 64, progress=False)
    monkeypatch.setitem(evaluate.LOGITS_AT_ONCE, "cpu", 97 * 5)
    head, sizes = evaluate.run_head, []
    monkeypatch.setattr(evaluate, "run_head", lambda *given: sizes.append(given[1].shape[1]) or head(*given))
    assert besa.perplexity(tiny_llama, tokens, 64, progress=False) == pytest.approx(whole, rel=1e-6)
    assert max(sizes) == 5 and sum(sizes) == 63


@torch.no_grad()
def test_hidden_state_errors_equal_those_of_the_whole_models_own_hidden_states(tiny_llama, windows):
    dense = copy.deepcopy(tiny_llama)
    besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)
    rows = hidden_state_errors(tiny_llama, dense, windows, progress=False)
    assert [(row["window"], row["block"]) for row in rows] == [(w, b) for w in range(6) for b in range(3)]
    last = []
    for model in (tiny_llama, dense):  # transformers normalizes the last of the hidden states that it returns
        model.model.norm.register_forward_pre_hook(lambda norm, inputs: last.append(inputs[0]))
    pruned, expected = (model(windows, output_hidden_states=True).hidden_states for model in (tiny_llama, dense))
    states = list(zip([*pruned[1:-1], last[0]], [*expected[1:-1], last[1]], strict=True))
    for row in rows:
        hidden, target = (state[row["window"]] for state in states[row["block"]])
        by_token = (hidden - target).norm(dim=-1) / target.norm(dim=-1)
        by_window = torch.linalg.matrix_norm(hidden - target) / torch.linalg.matrix_norm(target)
        assert row["error"] == pytest.approx(float(by_token.mean()), rel=1e-4)
        assert row["frobenius_error"] == pytest.approx(float(by_window), rel=1e-4)
        assert row["error"] > 0


def test_hidden_states_of_the_dense_model_have_no_error_and_other_models_are_refused(tiny_llama, windows):
    rows = hidden_state_errors(tiny_llama, copy.deepcopy(tiny_llama), windows, progress=False)
    assert all(row["error"] == row["frobenius_error"] == 0 for row in rows)
    shorter = copy.deepcopy(tiny_llama)
    shorter.model.layers, shorter.config.num_hidden_layers = shorter.model.layers[:2], 2
    with pytest.raises(ValueError, match=r"differ in \(blocks, hidden size\): \(2, 32\) and, dense, \(3, 32\)"):
        hidden_state_errors(shorter, tiny_llama, windows, progress=False)


@pytest.mark.parametrize(
    "tokens, seq_len, message",
    [
        (torch.zeros(10, dtype=torch.int64), 16, "10 tokens do not fill one segment of seq_len=16"),
        (torch.zeros(100, dtype=torch.int64), 65, r"seq_len 65 is outside \[2, 64\]"),
        (torch.full((100,), 97), 16, "vocabulary has 97"),
        (torch.zeros(0, dtype=torch.int64), 16, "no token ids"),
        (numpy.zeros(100, numpy.int64), 16, r"is not int64 token ids \(n_tokens,\) as besa.test_tokens makes"),
        (torch.zeros(100), 16, r"tokens of torch.float32 \(100,\) is not int64 token ids"),
    ],
)
def test_bad_tokens_are_refused(no_type_checks, tiny_llama, tokens, seq_len, message):
    with pytest.raises(ValueError, match=message):
        besa.perplexity(tiny_llama, tokens, seq_len, progress=False)


def test_a_loss_that_is_nan_names_the_segment(tiny_llama, monkeypatch):
    tokens = torch.arange(3 * 24) % 48
    tokens[2 * 24 + 5] = 90  # in the last segment alone
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[90] = float("nan")
    told = "segment 2: a loss of nan nats per token gives no finite perplexity; look for NaN .*: it is in torch.float32"
    with pytest.raises(ValueError, match=told):
        besa.perplexity(tiny_llama, tokens, 24, progress=False)
    assert besa.perplexity(tiny_llama, tokens[:48], 24, progress=False) > 1
    monkeypatch.setattr(evaluate, "n_ranks", lambda: 3)
    monkeypatch.setattr(evaluate, "rank", lambda: 2)  # whose first segment it is
    with pytest.raises(ValueError, match=r"segment 2: a loss of nan"):
        besa.perplexity(tiny_llama, tokens, 24, progress=False)
    monkeypatch.setattr(evaluate, "rank", lambda: 0)  # who would wait for the others' sums
    monkeypatch.setattr(evaluate, "from_all", lambda own: [own, None, "segment 2: a loss of nan nats per token"])
    with pytest.raises(ValueError, match=r"segment 2: a loss of nan"):
        besa.perplexity(tiny_llama, tokens, 24, progress=False)


def test_a_loss_whose_exp_overflows_names_the_segment(tiny_llama):
    with torch.no_grad():
        tiny_llama.lm_head.weight *= 1e6
    for dtype, way_out in ((torch.float32, "look for NaN"), (torch.bfloat16, "try dtype float32, or look for NaN")):
        with pytest.raises(ValueError, match=rf"segment 0: a loss of .*[0-9] nats per token .*; {way_out}"):
            besa.perplexity(tiny_llama.to(dtype), torch.arange(48), 24, progress=False)


def test_ranks_sum_to_one_process_even_where_there_are_more_than_segments(tiny_llama, monkeypatch):
    tokens = torch.randint(0, 97, (3 * 24,), generator=torch.Generator().manual_seed(0))
    whole = besa.perplexity(tiny_llama, tokens, 24, progress=False)
    shares = []
    monkeypatch.setattr(evaluate, "n_ranks", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr(evaluate, "rank", lambda rank=rank: rank)
        shares.append(math.log(besa.perplexity(tiny_llama, tokens, 24, progress=False)))
    assert sum(shares) == pytest.approx(math.log(whole)) and shares[3] == 0


def test_a_spread_model_is_measured_as_a_whole_one(tiny_llama, spread, windows):
    assert spread.model.layers[2].mlp.up_proj.weight.is_meta
    for n in (5, 8, 19):  # one batch, whole batches only, a rest
        tokens = torch.randint(0, 97, (n * 24,), generator=torch.Generator().manual_seed(n))
        whole = besa.perplexity(tiny_llama, tokens, 24, progress=False)
        found = besa.perplexity(spread, tokens, 24, progress=False)
        assert found == pytest.approx(whole, rel=1e-6)
        assert found.losses.tolist() == pytest.approx(whole.losses.tolist(), rel=1e-5)
    for name, projection in projections(spread.model.layers[2]).items():
        assert torch.equal(weight_of(projection), tiny_llama.model.layers[2].get_submodule(name).weight)
    assert max(row["error"] for row in hidden_state_errors(spread, tiny_llama, windows, progress=False)) < 1e-6
    with pytest.raises(ValueError, match=r"block 1, .*not in memory \(meta device\).*`besa.prune_checkpoint` takes"):
        besa.prune(spread, windows, besa.Wanda(), progress=False)
