"""What only notebooks and reproduce/ need: records, tables, figures, verdicts, analysis."""
