"""Prepares a folder of source files with its builder."""

import importlib

from dilbert_jax.data.record import EncodedFrames, check, from_example

SPLITS = ("train", "validation", "test")


def make_builder(name, manual_dir, data_dir, strict=False):
    module = importlib.import_module(f"dilbert_jax.data.{name}.{name}_dataset_builder")
    return module.Builder(manual_dir=manual_dir, data_dir=data_dir, strict=strict, progress=False)


def prepare(name, tmp_path, strict=False):
    """Prepares tmp_path/source and returns (builder, records by study id, split by study id)."""
    builder = make_builder(name, tmp_path / "source", tmp_path / "prepared", strict)
    builder.download_and_prepare()
    records, splits = {}, {}
    for split in SPLITS:
        for example in builder.as_data_source(split, decoders={"frames": EncodedFrames()}):
            record = from_example(example)
            check(record)
            records[record.study_id], splits[record.study_id] = record, split
    owners = {}
    for study_id, record in records.items():
        assert owners.setdefault(record.group_id, splits[study_id]) == splits[study_id]
    return builder, records, splits


def reasons(builder):
    return builder.preparation()["skipped_by_reason"]
