"""Records: the JSON file of a row (`record.py`), and verdicts over many (`verdicts.py`)."""

from reproduce.records.record import (
    Config,
    Record,
    checkpoint_identity,
    config_hash,
    find_record,
    is_reference,
    method_config,
    record_path,
    save_record,
    slug,
    target_of,
)

__all__ = [
    "Config",
    "Record",
    "checkpoint_identity",
    "config_hash",
    "find_record",
    "is_reference",
    "method_config",
    "record_path",
    "save_record",
    "slug",
    "target_of",
]
