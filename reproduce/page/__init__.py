"""The page: README's tables and the report, written from the records in results/reference."""
