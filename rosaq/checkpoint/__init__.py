"""Checkpoint directories: config.json and safetensors shards, read lazily by name and written shard by shard.

A model need not fit into memory: `WeightReader.get` maps one tensor, `write_shards` holds one shard. Files that are
damaged, missing or outside the directory are refused with the file's name and the bytes got and needed. Nothing is
ever unpickled.
"""

from rosaq.checkpoint.companions import LAYERS_FILE, copy_companions
from rosaq.checkpoint.hashes import HASHES_FILE, file_hash, read_hashes, write_hashes
from rosaq.checkpoint.hub import model_directory
from rosaq.checkpoint.measure import (
    bits_by_tensor,
    bits_per_weight,
    is_in_block,
    linear_bytes,
    linear_sizes,
    read_config,
    total_bytes,
)
from rosaq.checkpoint.new_directory import check_output, new_directory, put_in_place
from rosaq.checkpoint.reader import INDEX_FILE, SINGLE_FILE, WeightReader, read_header, read_json, weights_file
from rosaq.checkpoint.writer import write_shards

__all__ = [
    "HASHES_FILE",
    "INDEX_FILE",
    "LAYERS_FILE",
    "SINGLE_FILE",
    "WeightReader",
    "bits_by_tensor",
    "bits_per_weight",
    "check_output",
    "copy_companions",
    "file_hash",
    "is_in_block",
    "linear_bytes",
    "linear_sizes",
    "model_directory",
    "new_directory",
    "put_in_place",
    "read_config",
    "read_hashes",
    "read_header",
    "read_json",
    "total_bytes",
    "weights_file",
    "write_hashes",
    "write_shards",
]
