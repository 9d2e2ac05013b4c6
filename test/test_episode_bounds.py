"""HDF5 from outside: data that are only declared, kept elsewhere or packed too tightly are refused before reading."""

from __future__ import annotations

import os
import re
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
from hdf5_files import (
    ACTIONS,
    IMAGES,
    another_filter,
    attribute,
    bomb,
    circle,
    declared,
    replaced,
    virtual,
    write_episode,
)

from mobile_vla_inference.episodes.episode import EpisodeError
from mobile_vla_inference.episodes.find import find_episodes
from mobile_vla_inference.episodes.hdf5 import bounded, survey
from mobile_vla_inference.episodes.hdf5.reader import episodes_in
from mobile_vla_inference.episodes.hdf5.writer import EpisodeWriter
from mobile_vla_inference.training.dataset import read_training_episodes

#: What reading a refused file may allocate in addition to the interpreter, bytes.
MAX_BYTES = 64 << 20


def refusal(path: Path) -> str:
    """Read all of a bad file; return the message."""
    tracemalloc.start()
    try:
        with pytest.raises(EpisodeError) as error:
            for episode in episodes_in(path):
                for _ in episode.frames():
                    pass
                episode.simulation()
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()
    sentence = str(error.value)
    assert sentence.startswith(str(path))
    assert "\n" not in sentence
    assert ", expected " in sentence and "; " in sentence
    return sentence


def only_some(file: h5py.File) -> None:
    """Do as a recorder that was cut off: space for 6 images, 2 of them written."""
    del file["images"]
    images = file.create_dataset("images", IMAGES.shape, np.uint8, chunks=(1, *IMAGES.shape[1:]))
    images[:2] = IMAGES[:2]


def many_names_of_one_text(file: h5py.File) -> None:
    file.create_dataset("action_event_types", data=["x" * 1_000_000] + ["y"] * 5, dtype=h5py.string_dtype())


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (declared("images", (10**12, 12, 16, 3)), "stores 0 of"),
        (declared("actions", (10**12, 3)), "stores 0 of"),
        (declared("images", (6, 12, 16, 3), chunks=(1, 12, 16, 3)), "stores 0 of 6 chunks"),
        (declared("images", (6, 12, 16, 3)), "stores 0 of 3456 bytes"),
        (only_some, "stores 2 of 6 chunks"),
        (declared("images", (6, 12, 16, 3), dtype="S100000000"), r"stores 0 of"),
        (replaced("images", lambda file: h5py.Empty("u1")), r"has images uint8 \[\]"),
        (replaced("images", lambda file: np.zeros((6, 0, 16, 3), np.uint8)), "16 x 0 pixels"),
        (replaced("images", lambda file: np.zeros((6, 1, 5000, 3), np.uint8)), "5000 x 1 pixels"),
        (replaced("images", lambda file: file.create_group("images/front") and None), "is a group of front"),
        (replaced("images", lambda file: file.create_group("images") and None), "is an empty group"),
        (replaced("images", lambda file: np.dtype("u1")), "is a type without data"),
        (replaced("actions", lambda file: file.create_group("actions/arm") and None), "is a group of arm"),
        (replaced("actions", lambda file: np.array([[b"w", b"a", b"s"]] * 6)), "actions of type text"),
        (replaced("actions", lambda file: np.array([["w", "a", "s"]] * 6, object)), "actions of type text"),
        (replaced("actions", lambda file: ACTIONS.astype(np.complex64)), "actions of type complex64"),
        (replaced("actions", lambda file: ACTIONS > 0), "actions of type bool"),
        (replaced("actions", lambda file: h5py.Empty("f")), r"actions \[\]"),
        (replaced("actions", lambda file: np.full((6, 3), np.inf)), "NaN or Inf"),
        (replaced("images", lambda file: h5py.SoftLink("/nothing")), "images is a link whose target does not exist"),
        (replaced("images", lambda file: h5py.ExternalLink("elsewhere.h5", "/images")), "images is a link to another"),
        (circle, "images is a circular link"),
        (virtual, "keeps its values in other files"),
        (
            declared("images", (6, 12, 16, 3), external=[("/dev/zero", 0, h5py.h5f.UNLIMITED)]),
            "keeps its values in other files",
        ),
        (another_filter, r"zstd \(filter 32015\)"),
        (bomb(2, 512), "unpacks to more than its chunks"),
        (attribute("total_duration", "1.2 s"), "total_duration is '1.2 s'"),
        (attribute("total_duration", h5py.Empty("f")), "total_duration is empty"),
        (attribute("total_duration", np.nan), "total_duration is 'nan'"),
        (attribute("total_duration", -1.0), "total_duration is -1 s"),
        (attribute("total_duration", [1.0, 2.0]), "expected a finite number"),
        (attribute("episode_name", h5py.Empty("S1")), "episode_name is empty"),
        (attribute("episode_name", ".."), "episode_name is '..'"),
        (attribute("episode_name", "x" * 300), "expected a name of 1 to 200 bytes"),
        (attribute("scenario", [1.5, 2.5]), r"scenario is float64 \[2\], expected text"),
        (attribute("instruction", np.zeros(4)), "instruction is float64"),
        (attribute("seed", "one"), "seed is 'one'"),
        (attribute("seed", 1.5), "seed is 1.5"),
        (lambda file: file.create_group("sight"), "sight is an empty group"),
        (lambda file: file.create_dataset("sight", (6, 10**12), np.float32), "stores 0 of"),
        (lambda file: file.create_dataset("sight", data=np.zeros((5, 2))), "has sight float64"),
        (lambda file: file.create_dataset("action_event_types", data=[b"go"] * 5), "has action_event_types"),
        (lambda file: file.create_group("action_event_types"), "action_event_types is an empty group"),
        (many_names_of_one_text, "action_event_types is 1000000 characters long"),
    ],
)
def test_what_can_not_be_an_episode_is_refused_before_it_is_read(tmp_path, change, found):
    assert re.search(found, refusal(write_episode(tmp_path / "e.h5", change)))


@pytest.mark.timeout(20)
def test_a_link_to_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.h5")

    def change(file: h5py.File) -> None:
        del file["images"]
        file["side"] = h5py.ExternalLink("pipe.h5", "/")
        file["images"] = h5py.SoftLink("/side/images")

    assert "images is a link to another file" in refusal(write_episode(tmp_path / "e.h5", change))
    assert "pipe.h5 is a named pipe" in refusal(tmp_path / "pipe.h5")


@pytest.mark.timeout(20)
def test_a_pipe_in_a_folder_of_episodes_is_named(tmp_path):
    write_episode(tmp_path / "a.h5", lambda file: None)
    os.mkfifo(tmp_path / "b.h5")
    with pytest.raises(EpisodeError, match=r"b\.h5 is a named pipe"):
        find_episodes(tmp_path)


def test_the_names_in_another_layout_are_reported(tmp_path):
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["observations/images/top"] = IMAGES
        file["action"] = ACTIONS
    sentence = refusal(tmp_path / "e.h5")
    assert f"e.h5 lacks the data sets images and actions (it contains action float32 {[*ACTIONS.shape]}" in sentence
    assert f"observations/images/top uint8 {[*IMAGES.shape]})" in sentence
    assert f"`h5copy -i {tmp_path / 'e.h5'} -o OUT.h5 -s /observations/images/top -d /images`" in sentence


@pytest.mark.parametrize(
    ("images", "actions", "sentence"),
    [
        (IMAGES, ACTIONS[:-1], f"has {len(IMAGES)} images but {len(ACTIONS) - 1} actions .*; leave out the steps"),
        (np.moveaxis(IMAGES, -1, 1), ACTIONS, r"; transpose the images with numpy.moveaxis\(images, 1, -1\)$"),
        (IMAGES.astype(np.int64), ACTIONS, "has images int64 .*; convert the images to uint8, 0 to 255$"),
        (IMAGES, np.zeros((len(IMAGES), 14)), "; keep the 3 of 14 columns that are linear x"),
        (IMAGES, ACTIONS[:, :2], "; add the columns that are not driven as zeros"),
        (IMAGES[..., 0], ACTIONS, "; repeat the images' one channel three times$"),
        (IMAGES[:0], ACTIONS[:0], "; record it again$"),
    ],
)
def test_the_error_about_another_shape_or_type_gives_the_conversion(tmp_path, images, actions, sentence):
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["images"], file["actions"] = images, actions
    assert re.search(sentence, refusal(tmp_path / "e.h5"))


def test_the_error_about_another_path_gives_the_command_to_make_episodes(tmp_path):
    (tmp_path / "table").mkdir()
    (tmp_path / "table/actions.csv").write_text("frame\n")
    (tmp_path / "bag").mkdir()
    (tmp_path / "bag/bag_0.mcap").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("a")
    for name, sentence in (
        ("table", r"is a folder with actions.csv, .*`mobile_vla make-bag .*bag-to-episodes BAG OUT_DIR`"),
        ("bag", r"is a bag, expected episodes .*`mobile_vla bag-to-episodes \S+ OUT_DIR`"),
        ("bag/bag_0.mcap", r"is a bag, expected episodes .*`mobile_vla bag-to-episodes \S+ OUT_DIR`"),
        ("empty", "is an empty folder, expected episodes"),
        ("notes", "contains no .h5 or .hdf5 file, only a.txt, expected episodes"),
    ):
        with pytest.raises(EpisodeError, match=sentence):
            find_episodes(tmp_path / name)


def test_a_link_within_the_file_is_followed(tmp_path):
    def change(file: h5py.File) -> None:
        file.move("images", "camera/front/frames")
        file["camera/now"] = h5py.SoftLink("front")
        file["images"] = h5py.SoftLink("camera/now/frames")

    (episode,) = find_episodes(write_episode(tmp_path / "e.h5", change))
    assert np.array_equal(np.stack(list(episode.frames())), IMAGES)


def test_attributes_of_one_element_are_texts_and_numbers(tmp_path):
    def change(file: h5py.File) -> None:
        file.attrs["episode_name"] = np.array([b"a\tb\x1b[31m"])
        file.attrs["total_duration"] = np.array([1.5], np.float32)
        file.attrs["scenario"] = np.int32(3)

    (episode,) = find_episodes(write_episode(tmp_path / "e.h5", change))
    assert (episode.name, episode.scenario, episode.duration_s) == ("a b [31m", "3", 1.5)


@pytest.mark.parametrize("chunks", [(4, 5, 16, 3), (6, 12, 16, 3), (1, 1, 1, 1), None])
@pytest.mark.parametrize("compression", ["gzip", "lzf", None])
def test_images_are_the_same_in_any_chunks(tmp_path, chunks, compression):
    if chunks is None and compression is not None:
        pytest.skip("what is packed is in chunks")

    def change(file: h5py.File) -> None:
        del file["images"]
        file.create_dataset("images", data=IMAGES, chunks=chunks, compression=compression, shuffle=chunks is not None)

    (episode,) = find_episodes(write_episode(tmp_path / "e.h5", change))
    assert np.array_equal(np.stack(list(episode.frames())), IMAGES)


def test_images_in_chunks_too_large_to_read_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bounded, "MAX_READ_BYTES", 2 * IMAGES[0].nbytes)

    def change(file: h5py.File) -> None:
        del file["images"]
        file.create_dataset("images", data=IMAGES, chunks=(3, 12, 16, 3))

    with pytest.raises(EpisodeError, match="h5repack -l images:CHUNK=1x12x16x3 IN OUT"):
        find_episodes(write_episode(tmp_path / "e.h5", change))


def test_images_that_hardly_pack_are_no_bomb(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (2, 400, 400, 3), dtype=np.uint8)
    with EpisodeWriter(tmp_path / "e.h5", (400, 400), instruction="go") as writer:
        for step, image in enumerate(noise):
            writer.add(float(step), image, (0.0, 0.0, 0.0))
    (episode,) = find_episodes(tmp_path / "e.h5")
    assert np.array_equal(np.stack(list(episode.frames())), noise)


def test_a_file_that_is_changed_while_it_is_read_is_refused(tmp_path):
    path = write_episode(tmp_path / "e.h5", lambda file: None)
    (episode,) = find_episodes(path)
    with h5py.File(path, "a") as file:
        del file["images"]
    with pytest.raises(EpisodeError, match="was changed while it was read"):
        list(episode.frames())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """Return the bytes of a small file as the package writes it."""
    path = tmp_path_factory.mktemp("whole") / "e.h5"
    with EpisodeWriter(path, (16, 12), instruction="go", scenario="s") as writer:
        for step, (image, command) in enumerate(zip(IMAGES, ACTIONS)):
            writer.add(float(step), image, command)
    return path.read_bytes()


@pytest.mark.timeout(60)
def test_a_file_that_keeps_the_library_busy_is_ended(whole, tmp_path, monkeypatch):
    """The global heap's first object, which holds the attributes' texts, declares that its successor has no size."""
    monkeypatch.setattr(survey, "EPISODE_LIMIT_S", 1.0)
    heap = whole.index(b"GCOL")
    data = bytearray(whole)
    size = int.from_bytes(data[heap + 24 : heap + 32], "little")
    following = heap + 32 + -(-size // 8) * 8
    data[following : following + 2] = b"\0\0"
    data[following + 8 : following + 16] = bytes(8)
    path = tmp_path / "e.h5"
    path.write_bytes(data)
    with pytest.raises(EpisodeError, match=r"e\.h5 (blocks the HDF5 library|is damaged|: the attribute)"):
        find_episodes(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("import time; print('r', end='', flush=True); time.sleep(60)", "b.h5 blocks the HDF5 library"),
        ("import os; print('rf', end='', flush=True); os.abort()", "c.h5 crashes the HDF5 library .SIGABRT"),
        ("print('rf!c.h5 is no good', end='', flush=True)", "c.h5 is no good"),
    ],
)
def test_what_happens_to_the_child_is_reported(tmp_path, monkeypatch, code, sentence):
    (tmp_path / "child.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(survey, "__name__", "child")
    monkeypatch.setattr(survey, "EPISODE_LIMIT_S", 1.0)
    with pytest.raises(EpisodeError, match=sentence):
        survey.survey([tmp_path / "b.h5", tmp_path / "c.h5"])


def test_a_child_that_can_not_start_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "__name__", "no_such_module")
    assert len(find_episodes(write_episode(tmp_path / "e.h5", lambda file: None))) == 1


@pytest.mark.timeout(120)
def test_damaged_bytes_are_a_sentence_or_an_episode(whole, tmp_path):
    """Damage many places: the library's errors differ, the package's don't."""
    generator = np.random.default_rng(0)
    for index in range(12):
        data = bytearray(whole[: len(whole) * 3 // 4] if index % 4 == 3 else whole)
        for place in generator.integers(0, min(3000, len(data)), 1 + index % 4):
            data[place] = generator.choice([0, 1, 255])
        path = tmp_path / f"{index}.h5"
        path.write_bytes(data)
        try:
            for episode in read_training_episodes(path, 8, "go"):
                assert len(episode.frames) == len(episode.commands)
        except EpisodeError as error:
            assert str(error).startswith(str(path))
