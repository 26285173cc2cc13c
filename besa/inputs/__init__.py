"""Name -> model, text, embedded assets."""
