"""What a model directory has beside weights and config.json: tokenizer, chat templates, settings, licence."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from rosaq.checkpoint.reader import INDEX_FILE

LAYERS_FILE = "rosaq_layers.json"  # what the pipeline measured of each linear
_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "additional_chat_templates/*.jinja")
_WRITTEN_ANEW = ("config.json", INDEX_FILE, LAYERS_FILE)


def copy_companions(source: Path, target: Path, without: Iterable[str] = ()) -> None:
    """Copy these files of `source` into `target`, but for those named `without`."""
    left = {*_WRITTEN_ANEW, *without}
    for path in (path for pattern in _PATTERNS for path in source.glob(pattern)):
        if path.name not in left:
            place = target / path.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            shutil.copy(path, place)
