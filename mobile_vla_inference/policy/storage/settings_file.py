"""The file with a checkpoint's settings: `NAME.policy.json` next to the file NAME, `policy.json` in a converted folder.

It contains the fingerprint of the checkpoint that it was confirmed for (fingerprint.py). For another checkpoint, even
the same one with other weights, its values are assumed, and the robot doesn't move. A file of the first format,
`X.policy.json` or `policy.json` without a fingerprint, contains assumed values too.
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
_MAX_BYTES = 64 << 10  # ten times the largest valid content
_MAX_NAME = 255  # of a file, by Linux's file systems
_MAX_SEARCHED = 100


@dataclass(frozen=True)
class StoredSettings:
    """The settings of a checkpoint, and their source.

    Attributes:
        settings: the values; all are assumed unless the file was confirmed for exactly this checkpoint.
        file: source of the values; None: the defaults.
        note: why the file doesn't count as confirmed, and the command that corrects it; None if it does.
    """

    settings: PolicySettings
    file: Path | None = None
    note: str | None = None


@dataclass(frozen=True)
class _Content:
    """The content of a settings file; without fingerprint and name of a checkpoint in the first format."""

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
    """Write the settings of a checkpoint with its fingerprint, and return the file. It has its old or its new content.

    In a converted folder, the file's hash in the list is updated.

    Args:
        checkpoint: its file or folder.
        settings: the values.
        confirmed_for: fingerprint of the checkpoint that they were chosen for; None: of the present content.
        name: of the checkpoint in messages; None: the name of the file or folder.

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
    """Load the settings of a checkpoint; without a file they are the defaults, all assumed.

    They are from the first of: the file at `settings_path` with this checkpoint's fingerprint; a file in the same
    folder with that fingerprint (the checkpoint was renamed without it); the file at `settings_path` with another
    fingerprint; `X.policy.json` and `policy.json` next to `X.pth`. All but the first are assumed, with a note.

    Args:
        checkpoint: its file or folder.
        confirmed_for: its fingerprint; None: of the present content.

    Raises:
        CheckpointError: the checkpoint can't be read, or the file is damaged or holds an impossible value.
    """
    checkpoint = Path(checkpoint)
    here = confirmed_for or fingerprint(read_index(checkpoint))
    own = settings_path(checkpoint)
    in_own = found = _read(own) if _exists(own) else None
    if found is not None and found.fingerprint == here:
        return StoredSettings(found.settings, own)
    found = _of_another_name(checkpoint, here) or found
    if found is None and not checkpoint.is_dir():
        former = (checkpoint.with_suffix(f".{SETTINGS_FILE}"), checkpoint.with_name(SETTINGS_FILE))
        found = next((_read(path) for path in former if _exists(path)), None)
    if found is None:
        return StoredSettings(PolicySettings.all_assumed())
    return StoredSettings(found.settings.as_assumed(), found.file, _note(checkpoint, here, found, in_own))


def edited_since_listed(folder: Path) -> bool:
    """Return whether a converted folder's settings differ from its list of hashes: edited by hand, or damaged.

    Raises:
        CheckpointError: the list is damaged.
    """
    path = folder / SETTINGS_FILE
    if not folder.is_dir() or not path.is_file() or not (folder / CHECKSUMS_FILE).exists():
        return False
    return read_checksums(folder).get(SETTINGS_FILE) != sha256_of(path)


def _note(checkpoint: Path, here: str, found: _Content, in_own: _Content | None) -> str:
    """Return why the values of `found` are not confirmed, and what to do; `in_own` is at the checkpoint's own path."""
    command = f"check them and run {confirm_command(checkpoint)}"
    if found.fingerprint is None:
        return (
            f"{found.file} doesn't name the checkpoint that its settings were confirmed for (it has the first format), "
            f"so all of them are assumed; {command}"
        )
    if found.fingerprint == here:
        return (
            f"{found.file} was confirmed for exactly these weights, but under another name, so all settings of "
            f"{checkpoint} are assumed; {_kept(checkpoint, found, in_own)}run {_renaming(checkpoint, found, in_own)}, "
            f"or {command}"
        )
    return (
        f"{found.file} was confirmed for {found.name} ({short(found.fingerprint)}), but {checkpoint} is another "
        f"checkpoint ({short(here)}), so all of its settings are assumed; {command}"
    )


def _kept(checkpoint: Path, found: _Content, in_own: _Content | None) -> str:
    """Return a clause about the file at the checkpoint's own path, if there is one, and how it differs."""
    if in_own is None:
        return ""
    theirs, own = (content.settings.to_json() for content in (found, in_own))
    differing = "; ".join(
        f"{name}: {json.dumps(theirs[name]['value'], ensure_ascii=False)} / "
        f"{json.dumps(own[name]['value'], ensure_ascii=False)}"
        for name in theirs
        if theirs[name]["value"] != own[name]["value"]
    )
    owner = "no named checkpoint" if in_own.name is None else f"{in_own.name} ({short(in_own.fingerprint)})"
    difference = f"differs from it in {differing} there" if differing else "has the same values"
    return f"{settings_path(checkpoint)}, of {owner}, already exists and {difference}; to keep it too, "


def _renaming(checkpoint: Path, found: _Content, in_own: _Content | None) -> str:
    """Return the commands that copy settings and processors to the checkpoint's name, and overwrite nothing."""
    own = settings_path(checkpoint)
    commands = []
    if in_own is not None:
        names = (own.with_name(f"{own.name}.old{number or ''}") for number in itertools.count())
        commands.append(("mv", own, next(name for name in names if not _exists(name))))
    commands.append(("cp", found.file, own))
    former = found.file.with_name(found.file.name[: -len(SETTINGS_FILE)].rstrip(".") or checkpoint.name)
    theirs, place = processor_places(former)[0], processor_places(checkpoint)[0]
    if _exists(theirs) and not _exists(place):
        commands.append(("cp -r", theirs, place))
    return " && ".join(f"{verb} {shlex.quote(str(a))} {shlex.quote(str(b))}" for verb, a, b in commands)


def _of_another_name(checkpoint: Path, here: str) -> _Content | None:
    """Return a settings file in the checkpoint's folder that has its fingerprint; None if there is none."""
    if checkpoint.is_dir():
        return None
    try:
        paths = sorted(itertools.islice(checkpoint.parent.glob(f"*{SETTINGS_FILE}"), _MAX_SEARCHED))
    except OSError:
        return None  # a folder that this account may enter, but not list
    for path in paths:
        try:
            found = _read(path)
        except CheckpointError:
            continue  # it belongs to another checkpoint, and is reported when that one is opened
        if found.fingerprint == here:
            return found
    return None


def _read(path: Path) -> _Content:
    """Read a settings file.

    Raises:
        CheckpointError: it can't be read, has an unknown format, or holds an unknown setting or an impossible value.
    """
    data = read_json(path, _WHAT, _MAX_BYTES, error=CheckpointError)
    form = data.get("format", _UNBOUND_FORMAT) if isinstance(data, dict) else None
    keys = {_UNBOUND_FORMAT: {"settings"}, _FORMAT: {"settings", "checkpoint"}}
    if not isinstance(form, int) or form not in keys:
        raise CheckpointError(
            f"{path} has format {abridged(form)}, expected {_UNBOUND_FORMAT} or {_FORMAT}; update this package, or "
            f"remove the file and confirm the settings again"
        )
    if data.keys() - {"format"} != keys[form]:
        wrong = sorted((data.keys() - {"format"}) ^ keys[form])
        raise CheckpointError(
            f"{path} has wrong or missing keys ({abridged(wrong)}), expected {', '.join(sorted(keys[form]))} "
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


def _exists(path: Path) -> bool:
    try:
        return path.is_symlink() or path.exists()  # a link to nothing is reported when it is read
    except OSError:
        return False  # the name is too long for a file


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_NAME
