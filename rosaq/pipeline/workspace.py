"""The temporary sibling of the output directory: one file per finished block, renamed to the output at the end.

A run that is killed leaves only this directory. Resuming checks that the request is the same one, and goes on after
the last finished block.
"""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rosaq.calibrate import is_first_rank, wait_for_all
from rosaq.checkpoint import check_output, put_in_place

Tensors = dict[str, Tensor]


class Workspace:
    """Files of an unfinished run for `output`, tied to a `request` (JSON values that decide the result). What is
    loaded goes to `device`."""

    def __init__(
        self, output: Path, request: dict[str, Any], device: torch.device, *, force: bool, resume: bool
    ) -> None:
        self.output = check_output(output, force=force)
        self.directory = self.output.parent / f".{self.output.name}.partial"
        self._request = json.loads(json.dumps(request))
        self._device, self._force = device, force
        wait_for_all()  # every rank looks before the first one writes
        if is_first_rank():
            self._open(force=force, resume=resume)
        wait_for_all()

    def _open(self, *, force: bool, resume: bool) -> None:
        """An empty directory with the request in it, or the one of the run to go on with."""
        if self.directory.exists():
            if resume:
                self._check_request()
                return
            if not force:
                raise ValueError(
                    f"output: got an unfinished run for {self.output} in {self.directory}, need resume (--resume) to "
                    "go on with it or force (--force) to discard it"
                )
            shutil.rmtree(self.directory)
        elif resume:
            raise ValueError(f"resume: got no unfinished run for {self.output} (looked for {self.directory})")
        self.directory.mkdir(parents=True)
        (self.directory / "request.json").write_text(json.dumps(self._request, indent=2) + "\n", encoding="utf-8")

    def _check_request(self) -> None:
        path = self.directory / "request.json"
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        own, other = _flat(self._request), _flat(earlier)
        differing = sorted(key for key in own.keys() | other.keys() if own.get(key) != other.get(key))
        if differing:
            got = {key: own.get(key) for key in differing}
            need = {key: other.get(key) for key in differing}
            raise ValueError(f"resume: got another request than the unfinished run: {got}, need {need}")

    def load(self, name: str) -> tuple[Tensors, dict[str, Any]] | None:
        """The tensors and JSON values saved under `name`, or None if that step did not finish."""
        path = self.directory / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                values = json.loads((file.metadata() or {})["values"])
                return {key: file.get_tensor(key).to(self._device) for key in file.keys()}, values  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(
                f"resume: got a damaged file {path} ({error}), need force (--force) to start again"
            ) from error

    def save(self, name: str, tensors: Tensors, values: dict[str, Any]) -> None:
        """Save a finished step; it appears under its name only when it is complete. All ranks come here with the same,
        the first one writes."""
        wait_for_all()  # no rank may find this step finished while another one is about to make it
        if is_first_rank():
            self._write(name, tensors, values)
        wait_for_all()

    def _write(self, name: str, tensors: Tensors, values: dict[str, Any]) -> None:
        path = self.directory / f"{name}.safetensors"
        partial = path.with_suffix(".writing")
        owned = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        try:
            save_file(owned, partial, metadata={"values": json.dumps(values)})
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error):
                free = shutil.disk_usage(self.directory).free
                needed = sum(tensor.nbytes for tensor in owned.values())
                raise OSError(
                    errno.ENOSPC, f"output: disk full: got {free} bytes free, need {needed} for {path}"
                ) from error
            raise
        partial.replace(path)

    def num_finished_blocks(self) -> int:
        """How many blocks, counted from the first, are finished."""
        count = 0
        while (self.directory / f"{block_name(count)}.safetensors").is_file():
            count += 1
        return count

    def discard_if_empty(self) -> None:
        """Remove the directory when not a single step is finished: there is nothing to resume."""
        if is_first_rank() and self.directory.exists() and not any(self.directory.glob("*.safetensors")):
            shutil.rmtree(self.directory)

    def final_directory(self) -> Path:
        """An empty directory to write the checkpoint into."""
        final = self.directory / "final"
        shutil.rmtree(final, ignore_errors=True)
        final.mkdir()
        return final

    def commit(self) -> None:
        """Put the written checkpoint in the output's place and remove the rest."""
        wait_for_all()  # a slower rank may still be reading the last step
        if is_first_rank():
            self._rename()
        wait_for_all()

    def _rename(self) -> None:
        check_output(self.output, force=self._force)
        put_in_place(self.directory / "final", self.output)
        shutil.rmtree(self.directory)


def block_name(index: int) -> str:
    """Name of the saved step of block `index`."""
    return f"block-{index:05d}"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted names: {"recipe": {"bits": 3}} -> {"recipe.bits": 3}."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result
