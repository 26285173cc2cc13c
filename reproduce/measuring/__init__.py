"""Measurements of single notebooks: hidden states, bits, allocations, cycles."""
