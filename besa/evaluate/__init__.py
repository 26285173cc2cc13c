"""Perplexity, zero-shot accuracy and accelerator cycles of a pruned model."""
