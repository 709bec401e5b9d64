"""Where a model is: a directory of this machine, or a repository of the hub, which is downloaded."""

from __future__ import annotations

from pathlib import Path

from rosaq.checkpoint.hashes import HASHES_FILE

# Never pickles, and never the same weights in a second form (Mistral's own, or a folder's for other runtimes).
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", HASHES_FILE]
_NOT_FILES = ["consolidated*", "*/*.safetensors", "*/*.json"]


def model_directory(model: str | Path, argument: str = "model") -> Path:
    """A local directory as it is, or the hub repository "owner/name" downloaded (safetensors only).

    FileNotFoundError, naming `argument`, for what is neither, and for a repository that cannot be reached.
    """
    path = Path(model)
    if path.is_dir():
        return path
    name = str(model)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{argument}: got {name!r}, need a model directory or a hub name 'owner/name'")
    from huggingface_hub import snapshot_download  # slow to import, and a local directory needs none of it
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES, ignore_patterns=_NOT_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{argument}: got {name!r}, which is no directory here and could not be downloaded "
            f"({type(error).__name__}), need a model directory or a reachable hub name"
        ) from error
