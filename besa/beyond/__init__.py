"""Methods that are not in the paper: exact budgets, learned scores, new weights after pruning, training with zeros."""
