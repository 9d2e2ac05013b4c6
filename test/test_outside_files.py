"""Reading small files from outside: what a path can be, sizes, text and JSON; each refusal is one sentence, at once."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobile_vla_inference import outside_files
from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.outside_files import (
    MAX_JSON_DEPTH,
    check_regular,
    open_regular,
    parse_json,
    read_json,
    read_text,
)

WHAT = "the settings of a policy"
LIMIT = 1 << 20


def refused(call, *arguments, **options) -> str:
    """Return the sentence of a refusal."""
    with pytest.raises(CheckpointError) as refusal:
        call(*arguments, error=CheckpointError, **options)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    assert ", expected " in sentence and "; " in sentence
    return sentence


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(path.parent, os.O_RDONLY)
        try:  # the path of a socket is short
            server.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)


def lost_link(path: Path) -> None:
    path.symlink_to("moved away")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (pipe, "is a named pipe"),
        (link_to_a_device, "is a device"),
        (unix_socket, "is a socket"),
        (Path.mkdir, "is a folder"),
        (lost_link, "does not exist"),
        (link_to_itself, "Too many levels of symbolic links"),
    ],
)
def test_only_a_regular_file_is_read(tmp_path, make, kind):
    path = tmp_path / "policy.json"
    make(path)
    for read in (check_regular, open_regular):
        assert kind in refused(read, path, WHAT)
    assert kind in refused(read_json, path, WHAT, LIMIT)


@pytest.mark.timeout(10)
def test_a_pipe_that_takes_the_place_of_a_file_does_not_block(tmp_path, monkeypatch):
    path = tmp_path / "policy.json"
    pipe(path)
    monkeypatch.setattr(outside_files, "check_regular", lambda *_, **__: 0)
    assert "is a named pipe" in refused(read_text, path, WHAT, LIMIT)


def test_a_link_to_a_file_is_followed(tmp_path):
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "config.json").symlink_to("blob")
    assert read_json(tmp_path / "config.json", WHAT, LIMIT, error=CheckpointError) == {"a": 1}


def test_a_name_that_no_system_takes_is_refused():
    assert "null" in refused(read_text, "policy\0.json", WHAT, LIMIT)


def test_the_largest_size_is_read_and_one_byte_more_refused(tmp_path):
    path = tmp_path / "policy.json"
    path.write_bytes(b"x" * 100)
    assert read_text(path, WHAT, 100, error=CheckpointError) == "x" * 100
    assert "is larger than 99 bytes" in refused(read_text, path, WHAT, 99)


def test_a_file_of_no_told_size_is_bounded_too():
    """Files of the kernel say 0 bytes and hold more."""
    assert "is larger than 100 bytes" in refused(read_text, "/proc/self/maps", WHAT, 100)


@pytest.mark.timeout(10)
def test_a_file_of_terabytes_is_refused_unread(tmp_path):
    path = tmp_path / "policy.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert "is larger than" in refused(read_json, path, WHAT, LIMIT)


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text('{"a": "박스"}', encoding="utf-8-sig")
    assert read_json(path, WHAT, LIMIT, error=CheckpointError) == {"a": "박스"}


@pytest.mark.parametrize("encoding", ["cp949", "johab"])
def test_text_of_another_encoding_is_refused(tmp_path, encoding):
    path = tmp_path / "policy.json"
    path.write_text('{"a": "박스"}', encoding=encoding)
    assert "is not UTF-8 text (byte" in refused(read_json, path, WHAT, LIMIT)


def nested(depth: int, opening: str = "[") -> str:
    inner, closing = {"[": ("", "]"), '{"a":': ("0", "}")}[opening]
    return opening * depth + inner + closing * depth


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [MAX_JSON_DEPTH + 1, 2_000, 200_000])
def test_deep_nesting_is_refused(depth, opening):
    closed = nested(depth, opening)
    for text in (closed, closed[:-depth]):
        assert f"nested more than {MAX_JSON_DEPTH} levels" in refused(parse_json, text, "policy.json", WHAT)


def test_the_allowed_depth_and_any_width_are_read():
    assert parse_json(nested(MAX_JSON_DEPTH), "policy.json", WHAT, error=CheckpointError)
    wide = json.dumps([[[]]] * 10_000)
    assert len(parse_json(wide, "policy.json", WHAT, error=CheckpointError)) == 10_000


def test_brackets_in_a_string_are_no_nesting():
    text = json.dumps({"a\\": '\\"' + "[{" * 1_000, "b": "]"})
    assert parse_json(text, "policy.json", WHAT, error=CheckpointError) == json.loads(text)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("part", ['"', '\\"', '"\\"', '"\\', "\\", '["'])
def test_quotes_without_an_end_take_no_quadratic_time(part):
    refused(parse_json, "[" * (MAX_JSON_DEPTH + 1) + part * 500_000, "policy.json", WHAT)
    refused(parse_json, "[{" + '"' + part * 500_000 + "[" * 100, "policy.json", WHAT)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ('{"a": NaN}', "NaN is not a number"),
        ("[Infinity]", "Infinity is not a number"),
        ("[-Infinity]", "-Infinity is not a number"),
        ("[1e400]", "1e400 is too large"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' is given twice"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"a": 1} {"b": 2}', "Extra data"),
        ("{'a': 1}", "double quotes"),
        ('{"a": 1,}', "double quotes|trailing comma"),
    ],
)
def test_what_is_no_json_is_refused(text, reason):
    assert re.search(reason, refused(parse_json, text, "policy.json", WHAT))


def test_a_number_of_very_many_digits_is_refused():
    for digits in (50, 400, 1_000_000):
        assert f"a number of {digits} digits" in refused(parse_json, "1" * digits, "policy.json", WHAT)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda each: st.lists(each, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), each),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(JSON_VALUES, st.booleans())
def test_whatever_json_can_hold_is_read_as_it_is(value, ascii_only):
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert parse_json(data, "policy.json", WHAT, error=CheckpointError) == value


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text('[]{}":,\\ue1d80-.N\n ', max_size=200).map(str.encode))
def test_any_bytes_are_a_value_or_a_sentence(data):
    try:
        value = parse_json(data, "policy.json", WHAT, error=CheckpointError)
    except CheckpointError as refusal:
        assert "policy.json" in str(refusal)
    else:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
