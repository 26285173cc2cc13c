"""What a pruned model is worth: perplexity, zero-shot accuracy, accelerator cycles."""
