"""Settings count for the checkpoint that they were confirmed for, and for no other: copied, renamed, replaced."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mobile_vla_inference.action import AXES
from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.convert import convert
from mobile_vla_inference.policy.storage.checkpoint import open_checkpoint
from mobile_vla_inference.policy.storage.checkpoint_files import find_processors
from mobile_vla_inference.policy.storage.checksums import verify_folder
from mobile_vla_inference.policy.storage.config import FUSION_FEATURES, TOWERS, standard_config
from mobile_vla_inference.policy.storage.settings import PolicySettings
from mobile_vla_inference.policy.storage.settings_file import (
    confirm_command,
    load_settings,
    save_settings,
    settings_path,
)
from mobile_vla_inference.policy.synthetic.checkpoint import make_checkpoint
from mobile_vla_inference.policy.vla_policy import VlaPolicy
from mobile_vla_inference.tools import cli
from mobile_vla_inference.tools.arguments import SMALL_POLICY

#: What a person confirmed for one policy; the scale would drive another one wrongly.
SCALED = PolicySettings(action_scale=(0.5, 1.2), kosmos_pooling="last")
ALL = sorted(PolicySettings.all_assumed().assumed)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Return a folder with what `pair` returns, made once."""
    folder = tmp_path_factory.mktemp("pair")
    for path, seed in ((folder / "a" / "first.pth", 1), (folder / "b" / "second.pth", 2)):
        path.parent.mkdir()
        make_checkpoint(path, standard_config("tiny", "hybrid"), seed)
    first = folder / "a" / "first.pth"
    save_settings(first, replace(load_settings(first).settings, action_scale=SCALED.action_scale))
    settings_path(folder / "b" / "second.pth").unlink()
    return folder


@pytest.fixture
def pair(made, tmp_path) -> tuple[Path, Path]:
    """Return a confirmed checkpoint and another one of the same shapes without settings, in two folders."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "a" / "first.pth", tmp_path / "b" / "second.pth"


def is_assumed(path: Path) -> str:
    """Return the note on settings of which every one is assumed, with the command that confirms them."""
    stored = load_settings(path)
    assert list(stored.settings.assumed) == ALL
    assert stored.note is not None and confirm_command(path) in stored.note
    return stored.note


# --- the leak ---


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from((".pth", ".safetensors", "folder")),
    way=st.sampled_from(("replaced", "own name", "policy.json", "X.policy.json", "unbound")),
    place=st.integers(0, 4 * 5000 - 1),
    bit=st.integers(0, 7),
)
def test_settings_never_count_for_another_checkpoint(tmp_path_factory, form, way, place, bit) -> None:
    folder = tmp_path_factory.mktemp("leak")

    def saved(state: dict[str, torch.Tensor], name: str) -> Path:
        path = folder / name
        if form == ".pth":
            torch.save(state, path)
        elif form == ".safetensors":
            save_file(state, path)
        else:
            path.mkdir(exist_ok=True)
            save_file(state, path / "model.safetensors")
        return path

    weights = torch.arange(5000, dtype=torch.float32)
    first = saved({"a.weight": weights}, f"first{form}")
    written = save_settings(first, SCALED)
    assert load_settings(first).settings == SCALED and load_settings(first).note is None
    weights.view(torch.uint8)[place] ^= 1 << bit  # the same shapes, one bit of one weight
    second = saved({"a.weight": weights}, f"first{form}" if way == "replaced" else f"second{form}")
    if way == "own name":
        shutil.copy(written, settings_path(second))
    elif way in ("policy.json", "X.policy.json") and not second.is_dir():
        shutil.copy(
            written, second.with_name("policy.json") if way == "policy.json" else second.with_suffix("." + way[2:])
        )
    elif way == "unbound":
        settings_path(second).write_text(json.dumps({"format": 1, "settings": SCALED.to_json()}))
    stored = load_settings(second)
    assert list(stored.settings.assumed) == ALL
    if stored.file is not None:
        assert replace(stored.settings, assumed=()) == SCALED  # the values are there to be looked at
        is_assumed(second)


def test_a_file_copied_next_to_a_made_one_is_not_confirmed(pair) -> None:
    first, second = pair
    neighbour = shutil.copy(second, first.parent)
    stored = open_checkpoint(neighbour)
    assert stored.settings == PolicySettings.all_assumed() and stored.settings_file is None
    assert not open_checkpoint(first).settings.assumed


def test_the_policy_of_an_assumed_checkpoint_says_so(pair) -> None:
    first, second = pair
    shutil.copy(settings_path(first), settings_path(second))
    described = VlaPolicy.load(second).describe()
    assert list(described.assumed_settings) == ALL
    assert "first.pth" in described.warnings[0] and "--confirm" in described.warnings[0]
    assert described.action_scale == (0.5, 1.2)
    assert described.checkpoint_id != VlaPolicy.load(first).describe().checkpoint_id


def test_a_checkpoint_replaced_under_its_settings_is_assumed(pair) -> None:
    first, second = pair
    before = load_settings(first)
    assert not before.settings.assumed
    shutil.copy(second, first)
    note = is_assumed(first)
    assert "was confirmed for first.pth (zip:" in note and "is another checkpoint (zip:" in note


def test_a_checkpoint_replaced_while_it_is_loaded_is_refused(pair) -> None:
    first, second = pair

    def replace_once(stage: str) -> None:
        if stage.startswith("loading the weights") and second.exists():
            second.rename(first)

    with pytest.raises(CheckpointError, match=r"first\.pth was changed while it was loaded"):
        VlaPolicy.load(first, progress=replace_once)
    assert not second.exists()


def test_a_file_moved_or_copied_with_its_settings_stays_confirmed(pair, tmp_path) -> None:
    first, _ = pair
    moved = tmp_path / "elsewhere"
    first.parent.rename(moved)
    assert not load_settings(moved / first.name).settings.assumed
    for end in ("", ".policy.json"):
        shutil.copy(moved / f"first.pth{end}", tmp_path / f"other name.pth{end}")
    stored = load_settings(tmp_path / "other name.pth")
    assert not stored.settings.assumed and stored.note is None


def test_a_file_renamed_without_its_settings_says_how_to_mend_it(pair) -> None:
    first, second = pair
    renamed = first.rename(first.with_name("re named.pth"))
    note = is_assumed(renamed)
    assert "first.pth.policy.json was confirmed for exactly these weights" in note
    assert load_settings(renamed).settings.action_scale == SCALED.action_scale
    command = note.partition("run cp ")[2].partition(", or")[0]
    assert os.system(f"cp {command}") == 0  # as a person would type it
    assert not load_settings(renamed).settings.assumed
    shutil.copy(second, first.with_name("other.pth"))
    assert load_settings(first.with_name("other.pth")).file is None


def test_settings_of_this_checkpoint_win_over_those_of_another(pair) -> None:
    first, second = pair
    second = second.rename(first.parent / "second.pth")
    save_settings(second, replace(SCALED, step_period_s=0.7))
    for end in ("", ".policy.json"):  # the weights change names, and their settings don't
        assert first.with_name(f"first.pth{end}").exists()
    first.rename(first.with_name("swap"))
    second.rename(first)
    assert load_settings(first).settings.step_period_s == 0.7
    assert "second.pth.policy.json" in is_assumed(first)


def commands_of(note: str) -> str:
    """Return the shell commands that a note on a renamed checkpoint gives."""
    return note.split("run ", 1)[1].split(", or check them", 1)[0]


def test_a_renamed_checkpoint_works_after_the_commands_of_its_note(pair) -> None:
    first, _ = pair
    renamed = first.rename(first.with_name("new name.pth"))
    with pytest.raises(CheckpointError, match="no processor folder"):
        find_processors(renamed)
    subprocess.run(commands_of(is_assumed(renamed)), shell=True, check=True)
    assert not load_settings(renamed).settings.assumed and load_settings(renamed).note is None
    assert find_processors(renamed) == renamed.with_suffix(".processors")
    assert find_processors(first).is_dir()  # the folder before is kept


@pytest.mark.parametrize("kept_before", (False, True))
def test_settings_of_others_under_its_name_are_named_and_kept(pair, kept_before) -> None:
    first, second = pair
    second = second.rename(first.with_name("second.pth"))
    own, theirs = settings_path(second), first.with_name("third.pth.policy.json")
    theirs.write_bytes(save_settings(second, replace(SCALED, step_period_s=0.7)).read_bytes())
    other = settings_path(first).read_bytes()
    own.write_bytes(other)
    if kept_before:
        own.with_name(f"{own.name}.old").write_text("kept before")
    note = is_assumed(second)
    assert f"{own}, of first.pth (" in note
    assert "step_period_s: 0.7 / 0.3" in note and 'kosmos_pooling: "last" / "mean"' in note
    assert "action_scale: " not in note  # is the same in both
    subprocess.run(commands_of(note), shell=True, check=True)
    assert not load_settings(second).settings.assumed and load_settings(second).settings.step_period_s == 0.7
    assert own.with_name(f"{own.name}.old{1 if kept_before else ''}").read_bytes() == other
    if kept_before:
        assert own.with_name(f"{own.name}.old").read_text() == "kept before"


# --- files of the first format ---


@pytest.mark.parametrize("name", ("first.pth.policy.json", "first.policy.json", "policy.json"))
@pytest.mark.parametrize("form", ({"format": 1}, {}))
def test_a_file_of_the_first_form_gives_values_as_assumed(pair, name, form) -> None:
    first, _ = pair
    settings_path(first).unlink()
    first.with_name(name).write_text(json.dumps({**form, "settings": SCALED.to_json()}))
    assert "doesn't name the checkpoint" in is_assumed(first)
    assert load_settings(first).settings.kosmos_pooling == "last"
    assert cli.main(["inspect", str(first), "--confirm"]) == 0
    stored = load_settings(first)
    assert (stored.file, stored.settings.kosmos_pooling, stored.note) == (settings_path(first), "last", None)
    assert not stored.settings.assumed


def test_unfit_values_of_another_checkpoint_name_their_file(pair) -> None:
    first, _ = pair
    settings_path(first).unlink()
    odd = replace(SCALED, fusion_features=("clip_image",))
    first.with_name("policy.json").write_text(json.dumps({"settings": odd.to_json()}))
    with pytest.raises(CheckpointError, match=r"policy\.json \(not confirmed for this checkpoint\): setting fusion_f"):
        open_checkpoint(first)


# --- converted folders ---


def test_a_converted_folder_is_confirmed_as_its_source_is(pair, tmp_path) -> None:
    first, second = pair
    folder = convert(first, tmp_path / "folder").folder
    assert load_settings(folder).settings == load_settings(first).settings
    assert json.loads((folder / "policy.json").read_text())["checkpoint"]["name"] == "folder"
    assert verify_folder(folder).passed
    shutil.copytree(folder, tmp_path / "copy")
    assert not load_settings(tmp_path / "copy").settings.assumed
    shutil.copy(settings_path(first), settings_path(second))  # of another checkpoint
    assert list(load_settings(convert(second, tmp_path / "other").folder).settings.assumed) == ALL
    assert not convert(first, tmp_path / "again", dtype="int8").warnings


def test_shards_of_another_conversion_are_not_confirmed(pair, tmp_path) -> None:
    first, second = pair
    folder, other = (convert(path, tmp_path / path.stem).folder for path in (first, second))
    shard = "model-00001-of-00001.safetensors"
    shutil.copy(other / shard, folder / shard)
    assert "first" in is_assumed(folder)


def test_a_trained_head_on_frozen_towers_is_another_checkpoint(pair, tmp_path) -> None:
    first, _ = pair
    folder = convert(first, tmp_path / "folder").folder
    shard = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(shard)
    save_file(tensors, shard)  # by another program: the header differs, the weights are the same
    assert not load_settings(folder).settings.assumed
    save_file({**tensors, "actions.mlp.8.bias": tensors["actions.mlp.8.bias"] + 0.1}, shard)
    is_assumed(folder)


def test_the_small_policy_is_confirmed() -> None:
    stored = load_settings(SMALL_POLICY)
    assert not stored.settings.assumed and stored.note is None


# --- inspect ---


def test_inspect_shows_the_source_of_settings_and_confirms_them(pair, tmp_path, capsys) -> None:
    first, second = pair
    shutil.copy(settings_path(first), settings_path(second))
    assert cli.main(["inspect", str(first)]) == 0
    out = capsys.readouterr().out
    assert f"{settings_path(first)} (confirmed for this checkpoint)" in out and "warning" not in out
    assert f"checkpoint id: {open_checkpoint(first).fingerprint}" in out
    report = tmp_path / "report.json"
    assert cli.main(["inspect", str(second), "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert f"{settings_path(second)} (assumed)" in out
    assert f"warning: {load_settings(second).note}" in out and f"run {confirm_command(second)}" in out
    described = json.loads(report.read_text())
    assert described["settings"]["file"] == str(settings_path(second))
    assert described["settings"]["note"] == load_settings(second).note
    assert described["settings"]["values"]["action_scale"] == {"value": [0.5, 1.2], "confirmed": False}
    assert described["checkpoint_id"] == open_checkpoint(second).fingerprint
    assert cli.main(["inspect", str(second), "--confirm"]) == 0
    assert "action_scale = [0.5, 1.2] (was assumed)" in capsys.readouterr().out
    assert not load_settings(second).settings.assumed and not load_settings(first).settings.assumed


def test_inspect_shows_every_value_before_it_is_confirmed(pair, capsys) -> None:
    first, second = pair
    some = replace(SCALED, step_period_s=0.7, assumed=("step_period_s",))
    save_settings(first, some)
    assert cli.main(["inspect", str(first)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["step_period_s", "0.7", "assumed"] in rows
    assert ["kosmos_pooling", '"last"', "confirmed"] in rows
    assert {row[0] for row in rows if row and row[-1] in ("assumed", "confirmed")} >= set(ALL)
    assert cli.main(["inspect", str(second)]) == 0  # no file: features solved by their widths are shown too
    shown = capsys.readouterr().out
    assert '"clip_text"' in shown and "fusion_features      null" not in shown


def test_inspect_says_which_processors_or_that_they_are_missing(pair, tmp_path, capsys) -> None:
    first, _ = pair
    report = tmp_path / "report.json"
    assert cli.main(["inspect", str(first), "--json", str(report)]) == 0
    assert f"processors: {first.with_suffix('.processors')}" in capsys.readouterr().out
    assert json.loads(report.read_text())["processors"] == {
        "folder": str(first.with_suffix(".processors")),
        "missing": None,
    }
    renamed = first.rename(first.with_name("other.pth"))
    assert cli.main(["inspect", str(renamed), "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert "processors: missing" in out
    assert f"warning: no processor folder at {renamed.with_suffix('.processors')} or " in out
    assert json.loads(report.read_text())["processors"]["folder"] is None
    assert cli.main(["inspect", str(renamed), "--processors", str(first.with_suffix(".processors"))]) == 0
    assert f"processors: {first.with_suffix('.processors')}" in capsys.readouterr().out


def test_inspect_needs_no_tokenizers(pair) -> None:
    """docker/run.sh runs it with the Python of the host."""
    program = (
        "import sys; sys.modules['tokenizers'] = sys.modules['torch'] = None; "
        "from mobile_vla_inference.tools import cli; sys.exit(cli.main(['inspect', sys.argv[1]]))"
    )
    assert subprocess.run([sys.executable, "-c", program, str(pair[0])], check=False).returncode == 0


def test_an_edit_of_a_folder_is_kept_and_reported_until_it_is_confirmed(pair, tmp_path, capsys) -> None:
    first, _ = pair
    folder = convert(first, tmp_path / "folder").folder
    path = folder / "policy.json"
    content = json.loads(path.read_text())
    content["settings"]["step_period_s"]["value"] = 0.7
    path.write_text(json.dumps(content))
    assert cli.main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "(changed since it was confirmed)" in out and "confirmed for this checkpoint" not in out
    assert confirm_command(folder) in out
    assert cli.main(["verify", str(folder)]) == 2
    report = capsys.readouterr().err
    assert confirm_command(folder) in report and "convert again" not in report
    assert cli.main(["inspect", str(folder), "--confirm"]) == 0
    assert cli.main(["verify", str(folder)]) == 0
    assert load_settings(folder).settings.step_period_s == 0.7
    capsys.readouterr()
    assert cli.main(["inspect", str(folder)]) == 0
    assert "confirmed for this checkpoint" in capsys.readouterr().out
    path.write_text(json.dumps(content))
    (folder / "config.json").write_text("{}")  # more than an edit
    assert cli.main(["verify", str(folder)]) == 2
    assert "2 bad" in capsys.readouterr().err


def test_inspect_confirms_for_what_it_showed(pair, monkeypatch) -> None:
    """A checkpoint that is replaced while a person reads is not the one that was confirmed."""
    first, second = pair

    class Output(io.StringIO):
        def write(self, text: str) -> int:
            shutil.copy(second, first)
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Output())
    assert cli.main(["inspect", str(first), "--confirm"]) == 0
    is_assumed(first)


def test_axes_that_do_not_fit_the_actions_are_not_confirmed(pair, capsys) -> None:
    first, _ = pair
    settings_path(first).unlink()
    three = PolicySettings(action_axes=AXES, action_scale=(1.0,) * 3, action_offset=(0.0,) * 3)
    first.with_name("policy.json").write_text(json.dumps({"settings": three.to_json()}))
    assert cli.main(["inspect", str(first)]) == 0
    assert cli.main(["inspect", str(first), "--confirm"]) == 2
    assert "2 actions, but the setting action_axes names 3" in capsys.readouterr().err
    assert not settings_path(first).exists()


def test_a_folder_that_cannot_be_written_gives_a_sentence(pair, monkeypatch, capsys) -> None:
    first, _ = pair
    before = settings_path(first).read_bytes()

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mobile_vla_inference.policy.storage.settings_file.write_text_atomically", refuse)
    assert cli.main(["inspect", str(first), "--confirm"]) == 2
    assert "can't be written (Permission denied)" in capsys.readouterr().err
    assert settings_path(first).read_bytes() == before


# --- a file from outside ---


def entry(**values: Any) -> dict[str, Any]:
    return {"format": 1, "settings": {name: {"value": value, "confirmed": True} for name, value in values.items()}}


BOUND = {"fingerprint": "zip:" + "0" * 64, "name": "a.pth"}
BAD = {
    "no JSON": (b"{", "can't be read as JSON"),
    "deep": (b"[" * 50_000, "nested more than"),
    "large": (b" " * (1 << 20), "is larger than"),
    "no text": (b'{"settings": {}, "\xff": 1}', "not UTF-8"),
    "a list": ([], "format None"),
    "a later format": ({"format": 3, "settings": {}}, "format 3, expected 1 or 2"),
    "an invalid format": ({"format": [1], "settings": {}}, "format"),
    "a format of true": ({"format": True, "settings": {}, "checkpoint": BOUND}, "checkpoint"),
    "no settings": ({"format": 1}, "wrong or missing keys"),
    "settings of another type": ({"format": 1, "settings": [1]}, "expected an object"),
    "an unknown key": ({"format": 1, "settings": {}, "confirmed": True}, "wrong or missing keys"),
    "bound to nothing": ({"format": 2, "settings": {}}, "wrong or missing keys"),
    "bound to a number": ({"format": 2, "settings": {}, "checkpoint": 7}, "fingerprint and name"),
    "bound to no fingerprint": ({"format": 2, "settings": {}, "checkpoint": {**BOUND, "fingerprint": "x"}}, "finger"),
    "a name of megabytes": ({"format": 2, "settings": {}, "checkpoint": {**BOUND, "name": "a" * 999}}, "fingerprint"),
    "an unknown setting": (entry(scale=1), "unknown setting 'scale'"),
    "an unknown setting with a long name": (entry(**{"x" * 30_000: 1}), "unknown setting"),
    "an entry without a value": ({"settings": {"prompt": {"confirmed": True}}}, "setting prompt is"),
    "an entry with more": ({"settings": {"prompt": {"value": "{instruction}", "unit": "m"}}}, "setting prompt is"),
    "confirmed by a word": ({"settings": {"prompt": {"value": "{instruction}", "confirmed": "yes"}}}, "setting prompt"),
    "a scale of 1e308": (entry(action_scale=[1e308, 1.0]), "action_scale is .*1e-06 to 100"),
    "a scale of 0": (entry(action_scale=[0.0, 1.0]), "action_scale is"),
    "a scale of 5e-324": (entry(action_scale=[5e-324, 1.0]), "action_scale is"),
    "a scale of many digits": (
        b'{"settings": {"action_scale": {"value": [1' + b"0" * 400 + b", 1]}}}",
        "is a number of 401 digits",
    ),
    "a scale that is infinite": (b'{"settings": {"action_scale": {"value": [Infinity, 1]}}}', "Infinity"),
    "a scale that is true": (entry(action_scale=[True, 1.0]), "action_scale is"),
    "a scale that is one number": (entry(action_scale=2.0), "action_scale is"),
    "three scales": (entry(action_scale=[1.0] * 3), "action_scale is"),
    "an offset of 1e9": (entry(action_offset=[1e9, 0.0]), "action_offset is"),
    "a period of 0": (entry(step_period_s=0), "step_period_s is 0, expected 0.001 to 10 s"),
    "a period below 0": (entry(step_period_s=-0.3), "step_period_s is"),
    "a period that is text": (entry(step_period_s="0.3"), "step_period_s is"),
    "axes that are text": (entry(action_axes="linear.x"), "action_axes is"),
    "an axis twice": (entry(action_axes=["linear.x", "linear.x"]), "action_axes is"),
    "no axes": (entry(action_axes=[]), "action_axes is"),
    "an unknown axis": (entry(action_axes=["linear.x", "linear.z"]), "action_axes is"),
    "no features": (entry(fusion_features=[]), "fusion_features is"),
    "features without end": (entry(fusion_features=["clip_text"] * 500), "fusion_features is"),
    "features as numbers": (entry(fusion_features=[1, 2]), "fusion_features is"),
    "a pooling that is a list": (entry(kosmos_pooling=["mean"]), "kosmos_pooling is"),
    "a tanh that is text": (entry(head_tanh="yes"), "head_tanh is"),
    "a crop that is null": (entry(image_keep_aspect=None), "image_keep_aspect is"),
    "heads as a list": (entry(attention_heads=[4]), "attention_heads is"),
    "heads of no tower": (entry(attention_heads={"hand": 4}), "attention_heads is"),
    "no heads": (entry(attention_heads={"clip_text": 0}), "attention_heads is"),
    "half a head": (entry(attention_heads={"clip_text": 0.5}), "attention_heads is"),
    "a token below 0": (entry(clip_eos_token_id=-1), "clip_eos_token_id is"),
    "a prompt without the instruction": (entry(prompt="go"), "prompt is"),
    "a prompt of pages": (entry(prompt="{instruction}" + "a" * 2000), "prompt is"),
    "a prompt that is a number": (entry(prompt=7), "prompt is"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gives_one_sentence_that_names_it(pair, capsys, name) -> None:
    content, sentence = BAD[name]
    first, _ = pair
    settings_path(first).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    before = settings_path(first).read_bytes()
    with pytest.raises(CheckpointError, match=sentence) as error:
        load_settings(first)
    assert str(settings_path(first)) in str(error.value) and len(str(error.value)) < 800
    assert "\n" not in str(error.value)
    assert cli.main(["inspect", str(first), "--confirm"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert settings_path(first).read_bytes() == before


@pytest.mark.timeout(60)
def test_a_pipe_or_a_folder_in_place_of_the_file_is_refused(pair) -> None:
    first, _ = pair
    settings_path(first).unlink()
    os.mkfifo(settings_path(first))
    with pytest.raises(CheckpointError, match="a named pipe"):
        load_settings(first)
    settings_path(first).unlink()
    settings_path(first).mkdir()
    with pytest.raises(CheckpointError, match="a folder"):
        load_settings(first)
    settings_path(first).rmdir()
    os.mkfifo(first.with_name("other.pth.policy.json"))  # next to it, of another checkpoint
    assert load_settings(first).file is None


def test_a_name_that_is_too_long_for_the_settings(pair) -> None:
    first, _ = pair
    long = shutil.copy(first, first.with_name("x" * 250 + ".pth"))
    assert "under another name" in is_assumed(long)
    with pytest.raises(CheckpointError, match="can't be written"):
        save_settings(long, SCALED)


def legal_settings() -> st.SearchStrategy[PolicySettings]:
    numbers = st.floats(1e-6, 100.0) | st.floats(-100.0, -1e-6) | st.integers(1, 100)
    axes = st.lists(st.sampled_from(AXES), min_size=1, max_size=3, unique=True).map(tuple)

    def with_axes(names: tuple[str, ...]) -> st.SearchStrategy[PolicySettings]:
        per_axis = st.tuples(*[numbers] * len(names))
        return st.builds(
            PolicySettings,
            fusion_features=st.none() | st.lists(st.sampled_from(FUSION_FEATURES), min_size=1, max_size=5).map(tuple),
            attention_heads=st.dictionaries(st.sampled_from(TOWERS), st.integers(1, 64)),
            clip_eos_token_id=st.none() | st.integers(0, 100_000),
            head_tanh=st.none() | st.booleans(),
            action_scale=per_axis,
            action_offset=per_axis,
            action_axes=st.just(names),
            step_period_s=st.floats(0.001, 10.0),
            prompt=st.text(max_size=980).filter(lambda text: "{" not in text).map(lambda text: text + "{instruction}"),
            assumed=st.lists(st.sampled_from(ALL), unique=True).map(lambda names: tuple(sorted(names))),
        )

    return axes.flatmap(with_axes)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=legal_settings())
def test_legal_settings_come_back_as_they_were_written(tmp_path_factory, chosen) -> None:
    path = tmp_path_factory.mktemp("legal") / "a.pth"
    torch.save({"a.weight": torch.ones(3)}, path)
    written = save_settings(path, chosen)
    stored = load_settings(path)
    assert stored.settings == chosen and stored.note is None
    assert written.stat().st_size < 16 << 10
