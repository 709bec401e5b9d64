"""rosaq.text: reading documents, the built-in halves, and cutting windows of tokens."""

import json
import warnings

import pytest
import torch

from rosaq.text import builtin_text, parse_documents, read_text, select_documents, token_windows
from tests.models import ByteTokenizer


def test_plain_text_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_text(path) == ["one\n\ntwo\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "c4-validation.00000-of-00008.json"])
def test_json_lines_are_documents_and_blank_lines_are_skipped(name, tmp_path):
    path = tmp_path / name
    # A raw line separator U+2028 is legal inside a JSON string and must not end the line.
    lines = ['{"text": "one"}', "", json.dumps({"text": "a\u2028b", "url": "x"}, ensure_ascii=False)]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_text(path) == ["one", "a\u2028b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"got no text \(0 characters\)"),
        ("a.txt", b" \n", r"got no text \(2 characters\)"),
        ("a.txt", b"good\xff", "not UTF-8 at offset 4"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', 'line 2: got \'{"body"'),
        ("a.jsonl", b'{"text": 3}\n', "line 1: got"),
        ("a.json", b'[{"text": "x"}]\n', "line 1: got"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "line 2: got .* need a JSON object"),
    ],
)
def test_unreadable_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / name)


def test_missing_text_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="got no such file"):
        read_text(tmp_path / "none.txt")


def test_text_in_place_of_its_path_is_refused():
    with pytest.raises(FileNotFoundError, match="Once upon a time.*got no such file, need .* a list of documents"):
        read_text("Once upon a time. " * 1000)


def test_builtin_halves_share_no_paragraph_and_are_large_enough():
    halves = [builtin_text("calibration"), builtin_text("evaluation")]
    first, second = ({p.strip() for text in half for p in text.split("\n\n")} for half in halves)
    assert not first & second
    assert all(sum(map(len, half)) > 100_000 for half in halves)
    assert builtin_text("calibration") == halves[0]


def test_builtin_half_has_two_names():
    with pytest.raises(ValueError, match="half: got 'test'"):
        builtin_text("test")


@pytest.mark.parametrize(
    ("spec", "want"), [("0:2", "ab"), (":1", "a"), ("2:", "cd"), (":", "abcd"), ("2:9", "cd"), (None, "abcd")]
)
def test_documents_are_selected_by_range(spec, want):
    assert "".join(select_documents(list("abcd"), spec)) == want


@pytest.mark.parametrize("spec", ["3", "a:b", "-2:", "1:2:3", ""])
def test_documents_range_is_checked(spec):
    with pytest.raises(ValueError, match="documents: got .* need START:STOP"):
        parse_documents(spec)


def test_empty_documents_range_is_refused():
    with pytest.raises(ValueError, match="documents: got '4:' of 4 documents"):
        select_documents(list("abcd"), "4:")


def test_evaluation_windows_are_consecutive():
    windows = token_windows(ByteTokenizer(), ["abcd", "efghij"], 3, 4, None)
    assert windows.dtype == torch.int64
    assert bytes(windows.flatten().tolist()) == b"abcd\n\nefghij"


def test_calibration_windows_come_from_the_text_and_the_seed():
    text = ["the quick brown fox", "jumps over the lazy dog"]
    windows = token_windows(ByteTokenizer(), text, 50, 7, 1)
    assert windows.shape == (50, 7)
    joined = "\n\n".join(text).encode()
    assert all(bytes(window.tolist()) in joined for window in windows)
    assert torch.equal(windows, token_windows(ByteTokenizer(), text, 50, 7, 1))
    assert not torch.equal(windows, token_windows(ByteTokenizer(), text, 50, 7, 2))


def test_calibration_windows_reach_both_ends():
    windows = token_windows(ByteTokenizer(), ["abc"], 40, 2, 0)
    assert {bytes(window.tolist()) for window in windows} == {b"ab", b"bc"}


def test_too_little_text_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="text: got 10 tokens in 1 documents, need 12 for 3 windows of 4"):
        token_windows(ByteTokenizer(), ["0123456789"], 3, 4, None)
    with pytest.raises(ValueError, match="documents: got the str '0123456789', need a list"):
        token_windows(ByteTokenizer(), "0123456789", 2, 4, None)
    with pytest.raises(ValueError, match="num: got 0"):
        token_windows(ByteTokenizer(), ["0123456789"], 0, 4, None)


def test_windows_that_overlap_for_want_of_text_are_told():
    with pytest.warns(UserWarning, match="text: got 40 tokens for 5 windows of 10, which overlap: .* need 50 or more"):
        token_windows(ByteTokenizer(), ["a" * 40], 5, 10, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        token_windows(ByteTokenizer(), ["a" * 40], 4, 10, seed=0)


@pytest.mark.parametrize("tokens", [60, 61, 100, 239])
def test_calibration_windows_of_a_short_text_do_not_overlap(tokens: int):
    def positions(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text)))}

    windows = token_windows(positions, ["a" * tokens], 10, 6, seed=3)
    assert len(windows.unique()) == windows.numel() == 60
    assert (windows.diff(dim=1) == 1).all()
    assert not torch.equal(windows, windows[windows[:, 0].argsort()])  # in random order, as tuning takes them
    assert not torch.equal(windows, token_windows(positions, ["a" * tokens], 10, 6, seed=4))
