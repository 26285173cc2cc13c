import math

import pytest
import torch

import besa


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
    assert besa.perplexity(tiny_llama, tokens, seq_len, progress=False) == pytest.approx(expected, rel=1e-5)


def test_perplexity_does_not_depend_on_how_the_head_is_cut(tiny_llama, monkeypatch):
    tokens = torch.arange(64) % 97
    whole = besa.perplexity(tiny_llama, tokens, 64, progress=False)
    monkeypatch.setattr("besa.evaluate.LOGITS_AT_ONCE", 97 * 5)
    assert besa.perplexity(tiny_llama, tokens, 64, progress=False) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    "tokens, seq_len, message",
    [
        (torch.zeros(10, dtype=torch.int64), 16, "10 tokens do not fill one segment of seq_len=16"),
        (torch.zeros(100, dtype=torch.int64), 65, r"seq_len 65 is outside \[2, 64\]"),
        (torch.full((100,), 97), 16, "vocabulary has 97"),
        (torch.zeros(0, dtype=torch.int64), 16, "no token ids"),
    ],
)
def test_bad_tokens_are_refused(tiny_llama, tokens, seq_len, message):
    with pytest.raises(ValueError, match=message):
        besa.perplexity(tiny_llama, tokens, seq_len, progress=False)
