"""Hub names in place of directories: found in the hub's own cache, without a network."""

import shutil

import huggingface_hub.constants as hub
import pytest
from huggingface_hub.utils import filter_repo_objects

import rosaq
from rosaq.checkpoint import model_directory, write_hashes
from rosaq.checkpoint.hub import _FILES
from rosaq.cli import main
from rosaq.config import LinearFormat
from tests.models import save_dense, save_rosaq

NAME = "owner/name"


@pytest.fixture
def checkpoint(tmp_path):
    directory = save_rosaq(tmp_path / "made", default=LinearFormat(3, 32))
    write_hashes(directory)
    return directory


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache, as the only thing that can be reached."""
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def downloaded(cache, checkpoint):
    """NAME as a download leaves it: a snapshot of links to blobs."""
    repository, commit = cache / "models--owner--name", "0" * 40
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for path in checkpoint.iterdir():
        shutil.copy(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(repository / "blobs" / path.name)
    return snapshot


def test_a_name_is_found_in_the_cache(downloaded):
    assert model_directory(NAME).samefile(downloaded)


def test_all_of_a_checkpoint_is_asked_for_and_no_pickles(checkpoint):
    files = sorted(path.name for path in checkpoint.iterdir())
    assert "SHA256SUMS" in files
    pickles = ["pytorch_model.bin", "model.pt", "model.ckpt", "optimizer.pth"]
    assert sorted(filter_repo_objects([*files, *pickles], allow_patterns=_FILES)) == files


@pytest.mark.usefixtures("downloaded")
def test_a_downloaded_checkpoint_is_sound_and_convertible(tmp_path):
    verdict = rosaq.verify(NAME)
    assert verdict.is_sound
    assert ("hashes", "ok") in [(check.name, check.status) for check in verdict.checks]
    assert rosaq.convert(NAME, tmp_path / "dense").target_format == "dense"


@pytest.mark.usefixtures("downloaded")
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_the_command_line_takes_a_name(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, NAME])
    assert stop.value.code == 0
    assert {"inspect": "q_proj", "verify": "sound"}[command] in capsys.readouterr().out


def test_a_damaged_download_is_unsound(downloaded):
    blob = (downloaded / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\xff")
    assert not rosaq.verify(NAME).is_sound


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("directory", lambda name, _: rosaq.verify(name)),
        ("source", lambda name, out: rosaq.convert(name, out)),
        ("model", lambda name, out: rosaq.quantize(name, out)),
    ],
)
def test_what_is_nowhere_is_refused(tmp_path, argument, call):
    with pytest.raises(FileNotFoundError, match=f"^{argument}: got 'owner/other', .* could not be downloaded"):
        call("owner/other", tmp_path / "out")
    for name in ("other", "./other", "a/b/c", str(tmp_path / "other")):
        with pytest.raises(FileNotFoundError, match=f"^{argument}: got '{name}', need a model directory or a hub name"):
            call(name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("downloaded")
def test_a_directory_goes_before_the_hub(tmp_path, monkeypatch):
    save_dense(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert model_directory(NAME).resolve() == tmp_path / "owner" / "name"
