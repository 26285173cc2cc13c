"""The same loop from folder to folder: one block in memory, resumable."""
