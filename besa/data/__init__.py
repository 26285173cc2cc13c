"""Models, texts and embedded files by name."""
