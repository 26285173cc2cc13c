import math

import pytest
import torch

import besa
from besa.evaluate import perplexity as module


@pytest.mark.parametrize("seq_len", [24, 64])
@torch.no_grad()
def test_perplexity_equals_the_naive_loop_over_full_logits(tiny_llama, seq_len):
    tokens = torch.randint(0, 97, (200,), generator=torch.Generator().manual_seed(0))
    losses = []
    for start in range(0, 200 - seq_len + 1, seq_len):
        segment = tokens[None, start : start + seq_len]
        logits = tiny_llama(segment).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, segment[0, 1:]))
    found = besa.perplexity(tiny_llama, tokens, seq_len, progress=False)
    assert isinstance(found, float) and found == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-5)
    assert found.losses.tolist() == pytest.approx(torch.stack(losses).tolist(), rel=1e-5)


def test_segments_of_gemma_begin_with_bos(tiny_llama, monkeypatch):
    tokens = torch.randint(2, 97, (200,), generator=torch.Generator().manual_seed(0))
    begun = tokens.clone()
    begun[::24] = tiny_llama.config.bos_token_id
    as_cut, expected = (besa.perplexity(tiny_llama, each, 24, progress=False) for each in (tokens, begun))
    monkeypatch.setattr(tiny_llama.config, "model_type", "gemma3_text")
    assert besa.perplexity(tiny_llama, tokens, 24, progress=False) == expected != as_cut


def test_the_head_runs_on_a_few_tokens_at_a_time(tiny_llama, monkeypatch):
    tokens = torch.arange(64) % 97
    whole = besa.perplexity(tiny_llama, tokens, 64, progress=False)
    monkeypatch.setitem(module.LOGITS_AT_ONCE, "cpu", 97 * 5)
    head, sizes = module.run_head, []
    monkeypatch.setattr(module, "run_head", lambda *given: sizes.append(given[1].shape[1]) or head(*given))
    assert besa.perplexity(tiny_llama, tokens, 64, progress=False) == pytest.approx(whole, rel=1e-6)
    assert max(sizes) == 5 and sum(sizes) == 63


@pytest.mark.parametrize(
    "tokens, seq_len, message",
    [
        (torch.zeros(10, dtype=torch.int64), 16, "10 tokens do not fill a segment of seq_len=16"),
        (torch.zeros(100, dtype=torch.int64), 65, r"seq_len 65 is outside \[2, 64\]"),
        (torch.full((100,), 97), 16, "vocabulary of 97"),
    ],
)
def test_bad_tokens_are_refused(tiny_llama, tokens, seq_len, message):
    with pytest.raises(ValueError, match=message):
        besa.perplexity(tiny_llama, tokens, seq_len, progress=False)


@pytest.mark.parametrize("tokens", [torch.zeros(100), torch.zeros(4, 24, dtype=torch.int64), "tokens"])
def test_wrong_types_are_refused(tiny_llama, tokens):
    with pytest.raises(TypeError, match="tokens"):
        besa.perplexity(tiny_llama, tokens, 16, progress=False)


def test_a_loss_that_is_nan_names_the_segment(tiny_llama):
    tokens = torch.arange(3 * 24) % 48
    tokens[2 * 24 + 5] = 90  # in the last segment only
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[90] = float("nan")
    with pytest.raises(ValueError, match="segment 2 has a loss of nan nats per token; look for NaN"):
        besa.perplexity(tiny_llama, tokens, 24, progress=False)
    assert besa.perplexity(tiny_llama, tokens[:48], 24, progress=False) > 1


def test_a_loss_whose_exp_overflows_names_the_segment(tiny_llama):
    with torch.no_grad():
        tiny_llama.lm_head.weight *= 1e6
    for dtype, hint in ((torch.float32, "look for NaN"), (torch.bfloat16, "try dtype float32")):
        with pytest.raises(ValueError, match=rf"segment 0 has a loss of .*[0-9] nats per token; {hint}"):
            besa.perplexity(tiny_llama.to(dtype), torch.arange(48), 24, progress=False)


def test_ranks_sum_to_one_process_even_if_there_are_more_than_segments(tiny_llama, monkeypatch):
    tokens = torch.randint(0, 97, (3 * 24,), generator=torch.Generator().manual_seed(0))
    whole = besa.perplexity(tiny_llama, tokens, 24, progress=False)
    shares = []
    monkeypatch.setattr(module, "n_ranks", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        shares.append(math.log(besa.perplexity(tiny_llama, tokens, 24, progress=False)))
    assert sum(shares) == pytest.approx(math.log(whole)) and shares[3] == 0


def test_global_settings_change_nothing(tiny_llama):
    tokens = torch.randint(0, 97, (96,), generator=torch.Generator().manual_seed(0))
    expected = besa.perplexity(tiny_llama, tokens, 24, progress=False)
    torch.set_default_dtype(torch.float64)
    try:
        assert besa.perplexity(tiny_llama, tokens, 24, progress=False) == expected
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_model_is_left_as_it_was(tiny_llama):
    tiny_llama.train().requires_grad_(True)
    besa.perplexity(tiny_llama, torch.arange(48), 24, progress=False)
    assert tiny_llama.training and all(weight.requires_grad for weight in tiny_llama.parameters())
