"""What only notebooks and reproduce/ need: records, tables, figures, analysis, provenance."""
