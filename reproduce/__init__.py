"""Reproduce the tables and figures of the paper; the notebooks here import it, besa/ never does."""
