"""The file with a checkpoint's settings: `NAME.policy.json` beside the file NAME, `policy.json` in a converted folder.

It is bound to the checkpoint that it was confirmed for, by the fingerprint of its content (fingerprint.py). For any
other checkpoint, the same one with other weights included, its values count as assumed: the node doesn't move by them.
A file of the first form, `X.policy.json` or `policy.json` without a fingerprint, gives values too, as assumed. No
torch.
"""

from __future__ import annotations

import itertools
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile_vla_inference.atomic import write_text_atomically
from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.outside_files import read_json
from mobile_vla_inference.policy.storage.checkpoint_files import SETTINGS_FILE, processor_places, settings_path
from mobile_vla_inference.policy.storage.checksums import CHECKSUMS_FILE, read_checksums, sha256_of, update_checksum
from mobile_vla_inference.policy.storage.fingerprint import FINGERPRINT, fingerprint, short
from mobile_vla_inference.policy.storage.formats.recognition import read_index
from mobile_vla_inference.policy.storage.settings import PolicySettings, abridged

_WHAT = "the settings of a checkpoint"
_UNBOUND_FORMAT, _FORMAT = 1, 2
_MAX_BYTES = 64 << 10  # the largest legal content has a tenth
_MAX_NAME = 255  # of a file, by Linux's file systems
_MAX_SEARCHED = 100


@dataclass(frozen=True)
class StoredSettings:
    """The settings that count for a checkpoint, and where they are from.

    Attributes:
        settings: the values; every one is assumed unless the file was confirmed for this very checkpoint.
        file: where the values are from; None: the defaults.
        note: what is wrong with that file, and the command that mends it; None: it is this checkpoint's.
    """

    settings: PolicySettings
    file: Path | None = None
    note: str | None = None


@dataclass(frozen=True)
class _Content:
    """A settings file as it was read: the fingerprint and name of its checkpoint are None in the first form."""

    file: Path
    settings: PolicySettings
    fingerprint: str | None
    name: str | None


def confirm_command(checkpoint: Path) -> str:
    """Return the command by which a person confirms the settings of a checkpoint."""
    return f"mobile_vla inspect {shlex.quote(str(checkpoint))} --confirm"


def save_settings(
    checkpoint: Path, settings: PolicySettings, confirmed_for: str | None = None, *, name: str | None = None
) -> Path:
    """Write the settings of a checkpoint, bound to it, and return the file: it has its old content or the new one.

    In a converted folder, the file's hash in the list is brought up to date.

    Args:
        checkpoint: its file or folder.
        settings: what to write.
        confirmed_for: fingerprint of the checkpoint that they were chosen for; None: of what is there now.
        name: what people call it, for messages; None: the name of the file or folder.

    Raises:
        CheckpointError: the checkpoint can't be read, or the file can't be written.
    """
    checkpoint = Path(checkpoint)
    bound_to = {
        "fingerprint": confirmed_for or fingerprint(read_index(checkpoint)),
        "name": (name or checkpoint.resolve().name)[:_MAX_NAME],
    }
    content = {"format": _FORMAT, "checkpoint": bound_to, "settings": settings.to_json()}
    path = settings_path(checkpoint)
    try:
        write_text_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        if checkpoint.is_dir():
            update_checksum(checkpoint, path.name)
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be written ({error.strerror or error}), expected a folder that this account may write to; "
            f"check its permissions and the disk"
        ) from error
    return path


def load_settings(checkpoint: Path, confirmed_for: str | None = None) -> StoredSettings:
    """Load the settings of a checkpoint; they are the defaults, all assumed, where no file has any.

    What counts is the first of: the file at `settings_path`, where it is bound to this checkpoint; a file in the same
    folder that is (the checkpoint was renamed without it); the file at `settings_path`, whatever it is bound to;
    `X.policy.json` and `policy.json` beside `X.pth`. All but the first are assumed, with a note.

    Args:
        checkpoint: its file or folder.
        confirmed_for: its fingerprint; None: of what is there now.

    Raises:
        CheckpointError: the checkpoint can't be read, or the file that counts is damaged or holds what can't be.
    """
    checkpoint = Path(checkpoint)
    here = confirmed_for or fingerprint(read_index(checkpoint))
    own = settings_path(checkpoint)
    in_own = found = _read(own) if _is_there(own) else None
    if found is not None and found.fingerprint == here:
        return StoredSettings(found.settings, own)
    found = _of_another_name(checkpoint, here) or found
    if found is None and not checkpoint.is_dir():
        former = (checkpoint.with_suffix(f".{SETTINGS_FILE}"), checkpoint.with_name(SETTINGS_FILE))
        found = next((_read(path) for path in former if _is_there(path)), None)
    if found is None:
        return StoredSettings(PolicySettings.all_assumed())
    return StoredSettings(found.settings.as_assumed(), found.file, _note(checkpoint, here, found, in_own))


def edited_since_listed(folder: Path) -> bool:
    """Return whether a converted folder's settings are not what its list of hashes has: edited by hand, or damaged.

    Raises:
        CheckpointError: the list is damaged.
    """
    path = folder / SETTINGS_FILE
    if not folder.is_dir() or not path.is_file() or not (folder / CHECKSUMS_FILE).exists():
        return False
    return read_checksums(folder).get(SETTINGS_FILE) != sha256_of(path)


def _note(checkpoint: Path, here: str, found: _Content, in_own: _Content | None) -> str:
    """Return why the values of a file don't count as confirmed, and what to do; `in_own` is what its own file holds."""
    command = f"check them and run {confirm_command(checkpoint)}"
    if found.fingerprint is None:
        return (
            f"{found.file} doesn't say which checkpoint its settings were confirmed for (it is of the first form), so "
            f"all of them are assumed; {command}"
        )
    if found.fingerprint == here:
        return (
            f"{found.file} was confirmed for these very weights, but under another name, so all settings of "
            f"{checkpoint} are assumed; {_kept(checkpoint, found, in_own)}run {_renaming(checkpoint, found, in_own)}, "
            f"or {command}"
        )
    return (
        f"{found.file} was confirmed for {found.name} ({short(found.fingerprint)}), but {checkpoint} is another "
        f"checkpoint ({short(here)}), so all of its settings are assumed; {command}"
    )


def _kept(checkpoint: Path, found: _Content, in_own: _Content | None) -> str:
    """Return what the file under the checkpoint's own name is, where there is one, and how it differs."""
    if in_own is None:
        return ""
    theirs, own = (content.settings.to_json() for content in (found, in_own))
    differing = "; ".join(
        f"{name}: {json.dumps(theirs[name]['value'], ensure_ascii=False)} / "
        f"{json.dumps(own[name]['value'], ensure_ascii=False)}"
        for name in theirs
        if theirs[name]["value"] != own[name]["value"]
    )
    whose = "no checkpoint that it names" if in_own.name is None else f"{in_own.name} ({short(in_own.fingerprint)})"
    difference = f"differs from it in {differing} there" if differing else "has the same values"
    return f"{settings_path(checkpoint)}, of {whose}, is in its place and {difference}; to keep it as well, "


def _renaming(checkpoint: Path, found: _Content, in_own: _Content | None) -> str:
    """Return the commands that give settings and processors the checkpoint's name, and overwrite nothing."""
    own = settings_path(checkpoint)
    commands = []
    if in_own is not None:
        names = (own.with_name(f"{own.name}.old{number or ''}") for number in itertools.count())
        commands.append(("mv", own, next(name for name in names if not _is_there(name))))
    commands.append(("cp", found.file, own))
    former = found.file.with_name(found.file.name[: -len(SETTINGS_FILE)].rstrip(".") or checkpoint.name)
    theirs, place = processor_places(former)[0], processor_places(checkpoint)[0]
    if _is_there(theirs) and not _is_there(place):
        commands.append(("cp -r", theirs, place))
    return " && ".join(f"{verb} {shlex.quote(str(a))} {shlex.quote(str(b))}" for verb, a, b in commands)


def _of_another_name(checkpoint: Path, here: str) -> _Content | None:
    """Return the settings file in a checkpoint file's folder that is bound to it, unless it has none."""
    if checkpoint.is_dir():
        return None
    try:
        paths = sorted(itertools.islice(checkpoint.parent.glob(f"*{SETTINGS_FILE}"), _MAX_SEARCHED))
    except OSError:
        return None  # a folder that can be passed through, but not listed
    for path in paths:
        try:
            found = _read(path)
        except CheckpointError:
            continue  # another checkpoint's: what is wrong with it is said where that one is opened
        if found.fingerprint == here:
            return found
    return None


def _read(path: Path) -> _Content:
    """Read a settings file.

    Raises:
        CheckpointError: it can't be read, is of no known form, or holds a setting that is unknown or can't be.
    """
    data = read_json(path, _WHAT, _MAX_BYTES, error=CheckpointError)
    form = data.get("format", _UNBOUND_FORMAT) if isinstance(data, dict) else None
    keys = {_UNBOUND_FORMAT: {"settings"}, _FORMAT: {"settings", "checkpoint"}}
    if not isinstance(form, int) or form not in keys:
        raise CheckpointError(
            f"{path} is of format {abridged(form)}, expected {_UNBOUND_FORMAT} or {_FORMAT}; update this package, or "
            f"remove the file and confirm the settings again"
        )
    if data.keys() - {"format"} != keys[form]:
        wrong = sorted((data.keys() - {"format"}) ^ keys[form])
        raise CheckpointError(
            f"{path} has the wrong keys or lacks some ({abridged(wrong)}), expected {', '.join(sorted(keys[form]))} "
            f"as inspect --confirm writes them; correct it, or remove the file and confirm the settings again"
        )
    bound_to = _bound_to(path, data["checkpoint"]) if form == _FORMAT else (None, None)
    return _Content(path, PolicySettings.from_json(data["settings"], str(path)), *bound_to)


def _bound_to(path: Path, data: Any) -> tuple[str, str]:
    """Return the fingerprint and the name of the checkpoint that a file was confirmed for."""
    mark, name = (data.get("fingerprint"), data.get("name")) if isinstance(data, dict) else (None, None)
    if not isinstance(mark, str) or not FINGERPRINT.fullmatch(mark) or not _is_name(name):
        raise CheckpointError(
            f"{path} has the checkpoint {abridged(data)}, expected its fingerprint and name as inspect --confirm "
            f"writes them; remove the file and confirm the settings again"
        )
    return mark, name


def _is_there(path: Path) -> bool:
    try:
        return path.is_symlink() or path.exists()  # a link to nowhere is there, and has to be told
    except OSError:
        return False  # the name is longer than a file can have


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_NAME
