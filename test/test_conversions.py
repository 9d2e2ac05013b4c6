"""Camera messages to RGB and back, with plain objects in place of messages and the real messages where they count."""

from __future__ import annotations

import array
import subprocess
import sys
import zlib
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobile_vla_inference import decoding
from mobile_vla_inference.errors import FrameError
from mobile_vla_inference.frames import MAX_FRAME_SIDE_PX, read_image
from mobile_vla_inference.ros.conversions import (
    check_compressed,
    check_image,
    compressed_to_rgb,
    image_to_rgb,
    rgb_to_compressed,
    rgb_to_image,
)

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def image(encoding, pixels, padding=0, is_bigendian=0, **changes):
    """Lay [height, width, ...] out as a message of `encoding`, each row followed by `padding` bytes of 0xA5."""
    height, width = pixels.shape[:2]
    rows = np.ascontiguousarray(pixels).view(np.uint8).reshape(height, -1)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=0xA5)
    fields = {
        "encoding": encoding,
        "height": height,
        "width": width,
        "step": rows.shape[1],
        "is_bigendian": is_bigendian,
        "data": array.array("B", rows.tobytes()),
    }
    return SimpleNamespace(**{**fields, **changes})


def compressed(data, format="jpeg"):
    return SimpleNamespace(format=format, data=array.array("B", bytes(data)))


def new_message():
    """An empty message of either type, as the message classes make it."""
    return SimpleNamespace(header=SimpleNamespace())


def with_alpha(rgb):
    return np.dstack([rgb, np.full(rgb.shape[:2], 77, np.uint8)])


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(
    ("encoding", "pixels"),
    [
        ("rgb8", RGB),
        ("bgr8", RGB[..., ::-1]),
        ("8UC3", RGB[..., ::-1]),
        ("rgba8", with_alpha(RGB)),
        ("bgra8", with_alpha(RGB[..., ::-1])),
    ],
)
def test_colour_encodings_keep_every_pixel(encoding, pixels, padding):
    np.testing.assert_array_equal(image_to_rgb(image(encoding, pixels, padding)), RGB)


@pytest.mark.parametrize("encoding", ["mono8", "8UC1"])
def test_mono_becomes_grey(encoding):
    grey = RGB[..., 0]
    np.testing.assert_array_equal(image_to_rgb(image(encoding, grey, padding=3)), np.dstack([grey] * 3))


@pytest.mark.parametrize(("order", "is_bigendian"), [("<", 0), (">", 1)])
def test_16_bit_values_are_scaled_by_their_full_range_in_either_byte_order(order, is_bigendian):
    grey = np.array([[0, 255, 256, 0x1234], [0x7FFF, 0x8000, 0xFF00, 0xFFFF]], dtype=f"{order}u2")
    expected = np.array([[0, 0, 1, 0x12], [0x7F, 0x80, 0xFF, 0xFF]], dtype=np.uint8)
    result = image_to_rgb(image("mono16", grey, padding=2, is_bigendian=is_bigendian))
    np.testing.assert_array_equal(result, np.dstack([expected] * 3))
    deep = (RGB[..., ::-1].astype(np.uint16) << 8 | 0x5A).astype(f"{order}u2")
    np.testing.assert_array_equal(image_to_rgb(image("bgr16", deep, is_bigendian=is_bigendian)), RGB)


def test_is_bigendian_means_nothing_for_8_bit_values():
    np.testing.assert_array_equal(image_to_rgb(image("rgb8", RGB, is_bigendian=1)), RGB)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("order", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_gives_back_the_colour_behind_the_mosaic(order, bits):
    colour = np.array([220, 120, 30], dtype=np.uint8)
    corner = np.array([["rgb".index(letter) for letter in order[row : row + 2]] for row in (0, 2)])
    mosaic = colour[np.tile(corner, (4, 5))]
    if bits == 16:
        mosaic = mosaic.astype("<u2") << 8
    result = image_to_rgb(image(f"bayer_{order}{bits}", mosaic, padding=4))
    assert result.shape == (8, 10, 3)
    np.testing.assert_array_equal(result[2:-2, 2:-2], np.broadcast_to(colour, (4, 6, 3)))


# BT.601 with luma from 16 to 235, what cameras send: (Y, U, V) of plain red, green, blue and grey.
YUV_COLOURS = [((81, 90, 240), (255, 0, 0)), ((145, 54, 34), (0, 255, 0)), ((41, 240, 110), (0, 0, 255))]


@pytest.mark.parametrize(
    ("encoding", "order"),
    [("yuv422", "uyvy"), ("uyvy", "uyvy"), ("yuv422_yuy2", "yuyv"), ("yuyv", "yuyv")],
)
def test_yuv422_gives_the_colour_in_the_right_order(encoding, order):
    for (y, u, v), rgb in YUV_COLOURS:
        values = {"y": y, "u": u, "v": v}
        pair = np.array([values[letter] for letter in order], dtype=np.uint8)
        pixels = np.tile(pair.reshape(1, 2, 2), (3, 2, 1))
        result = image_to_rgb(image(encoding, pixels, padding=6))
        assert result.shape == (3, 4, 3)
        np.testing.assert_allclose(result, np.broadcast_to(rgb, result.shape), atol=3)


@pytest.mark.parametrize(("encoding", "order"), [("nv12", "uv"), ("nv21", "vu"), ("nv24", "uv")])
@pytest.mark.parametrize("padding", [0, 2])
def test_the_colour_rows_below_the_luma_are_read(encoding, order, padding):
    for (y, u, v), rgb in YUV_COLOURS:
        message = planar(encoding, y, [{"u": u, "v": v}[letter] for letter in order], padding)
        check_image(message)
        result = image_to_rgb(message)
        assert result.shape == (4, 6, 3)
        np.testing.assert_allclose(result, np.broadcast_to(rgb, result.shape), atol=3)
        # Every driver has its own idea of the last row's padding.
        message.data = message.data[: len(message.data) - padding * (2 if encoding == "nv24" else 1)]
        np.testing.assert_array_equal(image_to_rgb(message), result)


def planar(encoding, y, pair, padding=0, height=4, width=6):
    """A plain image: luma, then rows of colour pairs; the rows of both are padded."""
    luma = np.full((height, width), y, dtype=np.uint8)
    rows, pairs = (height, width) if encoding == "nv24" else (height // 2, width // 2)
    chroma = np.tile(np.array(pair, dtype=np.uint8), (rows, pairs))
    padded = [np.pad(plane, ((0, 0), (0, plane.shape[1] // width * padding))) for plane in (luma, chroma)]
    data = b"".join(plane.tobytes() for plane in padded)
    return image(encoding, luma, step=width + padding, data=data)


def test_nv24_gives_every_pixel_its_own_colour():
    """Against OpenCV's conversion of the same values as YUYV, where a pair of equal pixels has one colour."""
    luma, chroma = (np.random.default_rng(1).integers(16, 236, (5, 7, n), dtype=np.uint8) for n in (1, 2))
    message = image("nv24", luma[..., 0], data=luma.tobytes() + chroma.tobytes())
    for row, column in ((0, 0), (4, 6), (2, 3)):
        (y,), (u, v) = luma[row, column], chroma[row, column]
        pixel = image_to_rgb(image("yuyv", np.array([[[y, u], [y, v]]], dtype=np.uint8)))[0, 0]
        np.testing.assert_array_equal(image_to_rgb(message)[row, column], pixel)


@pytest.mark.parametrize("encoding", ["nv12", "nv21", "nv24"])
@pytest.mark.parametrize("change", [-1, 1, 6])
def test_planes_of_another_size_are_refused(encoding, change):
    """A plane of an aligned height puts the colour elsewhere, and no field of the message tells where."""
    message = planar(encoding, 81, (90, 240))
    message.data = message.data[:change] if change < 0 else message.data + array.array("B", bytes(change))
    reported = "expected .*: the chroma plane may be padded" if change > 0 else "expected"
    with pytest.raises(FrameError, match=f"holds {len(message.data)} bytes, {reported}"):
        check_image(message)
    with pytest.raises(FrameError, match=f"holds {len(message.data)} bytes, expected"):
        image_to_rgb(message)


def test_rgb8_is_a_view_of_the_message():
    message = image("rgb8", RGB, padding=2)
    assert np.shares_memory(image_to_rgb(message), np.frombuffer(message.data, np.uint8))


@pytest.mark.parametrize("kind", [bytes, np.array, lambda data: array.array("B", data)])
def test_data_may_be_of_any_kind_that_holds_bytes(kind):
    message = image("bgr8", RGB)
    message.data = kind(message.data)
    np.testing.assert_array_equal(image_to_rgb(message), RGB[..., ::-1])


def test_the_last_row_may_come_without_its_padding():
    message = image("rgb8", RGB, padding=5)
    message.data = message.data[:-5]
    np.testing.assert_array_equal(image_to_rgb(message), RGB)


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (image("rgb8", RGB, width=0), "0 x 6 pixels, expected 1 to"),
        (image("rgb8", RGB, height=0), "8 x 0 pixels, expected 1 to"),
        (image("rgb8", RGB, width=MAX_FRAME_SIDE_PX + 1), f"expected 1 to {MAX_FRAME_SIDE_PX} per side"),
        (image("rgb8", RGB, height=2**32 - 1), f"expected 1 to {MAX_FRAME_SIDE_PX} per side"),
        (image("rgb8", RGB, step=23), "step of 23 bytes, expected at least 24"),
        (image("rgb8", RGB, data=b""), "holds 0 bytes, expected at least 144"),
        (image("rgb8", RGB, padding=2, data=bytes(5 * 26 + 23)), "holds 153 bytes, expected at least 154"),
        (image("mono16", RGB[..., 0], step=8), "step of 8 bytes, expected at least 16"),
        (image("yuv422", RGB[:, :7, :2]), "7 x 6 pixels, expected even sides"),
        (image("nv21", RGB[..., 0], height=5), "8 x 5 pixels, expected even sides"),
        (image("nv12", RGB[:, :7, 0]), "7 x 6 pixels, expected even sides"),
    ],
)
def test_a_malformed_image_is_refused_with_a_sentence(message, sentence):
    with pytest.raises(FrameError, match=sentence):
        image_to_rgb(message)


@given(
    encoding=st.sampled_from(
        ["rgb8", "bgra8", "mono16", "bayer_rggb8", "bayer_gbrg16", "yuv422", "yuyv", "nv12", "nv21", "nv24"]
    ),
    width=st.integers(0, 12),
    height=st.integers(0, 12),
    step=st.integers(0, 60),
    is_bigendian=st.integers(0, 255),
    data=st.binary(max_size=800),
)
@settings(max_examples=300, deadline=None)
def test_any_message_gives_a_frame_of_its_size_or_a_frame_error(encoding, width, height, step, is_bigendian, data):
    message = SimpleNamespace(
        encoding=encoding, width=width, height=height, step=step, is_bigendian=is_bigendian, data=data
    )
    try:
        rgb = image_to_rgb(message)
    except FrameError:
        return
    assert rgb.shape == (height, width, 3)
    assert rgb.dtype == np.uint8


def test_other_encodings_go_to_cv_bridge(monkeypatch):
    class CvBridge:
        def imgmsg_to_cv2(self, message, desired_encoding):
            assert desired_encoding == "rgb8"
            return RGB

    monkeypatch.setitem(sys.modules, "cv_bridge", SimpleNamespace(CvBridge=CvBridge))
    assert image_to_rgb(image("yuv420", RGB)) is RGB


def test_a_missing_cv_bridge_is_reported_with_the_encodings_that_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv_bridge", None)
    with pytest.raises(FrameError, match=r"encoding is 'yuv420' and cv_bridge can't convert it.*expected one of rgb8"):
        image_to_rgb(image("yuv420", RGB))


@pytest.mark.parametrize("fault", [ImportError, AttributeError, TypeError, RuntimeError])
def test_a_cv_bridge_that_fails_is_reported_with_its_reason(monkeypatch, fault):
    class CvBridge:
        def imgmsg_to_cv2(self, message, desired_encoding):
            raise fault("numpy.core.multiarray\n failed")

    monkeypatch.setitem(sys.modules, "cv_bridge", SimpleNamespace(CvBridge=CvBridge))
    with pytest.raises(FrameError, match=r"32FC1.*\(numpy.core.multiarray failed\)"):
        image_to_rgb(image("32FC1", RGB[..., 0].astype(np.float32)))


def smooth_picture():
    """A picture that JPEG keeps almost as it is, red above and blue below; it blurs the border between them."""
    picture = np.zeros((48, 64, 3), dtype=np.uint8)
    picture[:32, :, 0] = 200
    picture[32:, :, 2] = 150
    return picture


def assert_like_smooth_picture(rgb):
    assert rgb.shape == (48, 64, 3)
    for rows in (slice(0, 28), slice(36, 48)):
        np.testing.assert_allclose(rgb[rows], smooth_picture()[rows], atol=4)


def encoded(extension, *options):
    return cv2.imencode(extension, smooth_picture()[..., ::-1], options)[1].tobytes()


@pytest.mark.parametrize(
    "data",
    [
        encoded(".jpg"),
        encoded(".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
        encoded(".jpg", cv2.IMWRITE_JPEG_RST_INTERVAL, 2),
        encoded(".jpg") + bytes(64),  # cameras pad their buffers
        encoded(".png"),
    ],
)
def test_compressed_images_keep_their_colours(data):
    assert_like_smooth_picture(compressed_to_rgb(compressed(data)))


def test_a_grey_jpeg_becomes_rgb():
    data = cv2.imencode(".jpg", np.full((16, 24), 90, np.uint8))[1]
    np.testing.assert_allclose(compressed_to_rgb(compressed(data)), np.full((16, 24, 3), 90), atol=2)


@pytest.mark.parametrize("extension", [".jpg", ".png"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.98])
def test_a_compressed_image_that_is_cut_off_is_refused(extension, kept):
    """Some versions of OpenCV fill the missing rows of a JPEG with grey instead."""
    data = encoded(extension)
    with pytest.raises(FrameError, match="cut off or corrupt"):
        compressed_to_rgb(compressed(data[: int(len(data) * kept)]))


def street():
    """A picture with edges and noise everywhere, as a camera's: its JPEG has about 28 kB."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[0:240, 0:320]
    picture = np.dstack([x % 256, y, (x + y) % 256]).astype(np.uint8)
    cv2.circle(picture, (160, 120), 60, (0, 0, 255), -1)
    return cv2.add(picture, rng.integers(0, 24, picture.shape, dtype=np.uint8))


KINDS_OF_JPEG = {
    "baseline": (),
    "progressive": (cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "restart markers": (cv2.IMWRITE_JPEG_RST_INTERVAL, 8),
    "4:4:4": (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
    "4:2:2": (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422),
}
STREETS = {kind: cv2.imencode(".jpg", street(), options)[1].tobytes() for kind, options in KINDS_OF_JPEG.items()}
EOI = b"\xff\xd9"


@pytest.mark.parametrize("kind", STREETS)
def test_a_whole_jpeg_has_the_pixels_that_opencv_decodes(kind):
    expected = cv2.imdecode(np.frombuffer(STREETS[kind], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(compressed_to_rgb(compressed(STREETS[kind])), expected)


def scan_start(data):
    return data.rindex(b"\xff\xda", 0, data.index(b"\xff\xda") + 2) + 16


@pytest.mark.parametrize("kind", STREETS)
@pytest.mark.parametrize("lost", [3000, 10_000])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_jpeg_that_lost_packets_in_the_middle_is_refused(kind, lost, data):
    """What a USB camera sends when packets are dropped: the end marker is there, libjpeg fills in and only warns."""
    whole = STREETS[kind]
    start = data.draw(st.integers(scan_start(whole), len(whole) - lost - 2))
    with pytest.raises(FrameError, match="cut off or corrupt"):
        compressed_to_rgb(compressed(whole[:start] + whole[start + lost :]))


@pytest.mark.parametrize("kind", ["baseline", "restart markers", "4:4:4", "4:2:2"])
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_jpeg_that_its_driver_ended_early_is_refused(kind, data):
    whole = STREETS[kind]
    end = data.draw(st.integers(scan_start(whole), len(whole) - 20))
    with pytest.raises(FrameError, match="cut off or corrupt"):
        compressed_to_rgb(compressed(whole[:end] + EOI))


@given(start=st.integers(scan_start(STREETS["baseline"]), len(STREETS["baseline"]) - 2002))
@settings(max_examples=50, deadline=None)
def test_a_jpeg_with_a_part_twice_or_filled_up_is_refused(start):
    whole = STREETS["baseline"]
    end = start + 2000
    for data in (whole[:end] + whole[start:], whole[:start] + b"\xff" * 2000 + whole[end:]):
        with pytest.raises(FrameError, match="cut off or corrupt"):
            compressed_to_rgb(compressed(data))


def test_a_jpeg_that_lost_restart_markers_or_what_is_between_them_is_refused():
    whole = STREETS["restart markers"]
    places = [place for place in range(len(whole)) if whole[place] == 0xFF and 0xD0 <= whole[place + 1] <= 0xD7]
    first, second, ninth = places[3], places[4], places[11]
    for name, data in {
        "marker lost": whole[:first] + whole[first + 2 :],
        "marker doubled": whole[:first] + whole[first : first + 2] + whole[first:],
        "interval lost": whole[:first] + whole[second:],
        "eight intervals lost": whole[:first] + whole[ninth:],
        "eight intervals twice": whole[:ninth] + whole[first:],
    }.items():
        with pytest.raises(FrameError, match="cut off or corrupt"):
            compressed_to_rgb(compressed(data))
            pytest.fail(name)


def test_half_of_a_jpeg_that_ends_with_the_next_one_is_refused():
    """A driver that took the end of one buffer for the middle of another."""
    whole = STREETS["baseline"]
    with pytest.raises(FrameError, match="cut off or corrupt"):
        compressed_to_rgb(compressed(whole[: len(whole) // 2] + whole))


def png_chunks(data):
    """Return the (place, length) of every chunk, length and checksum included."""
    places, position = [], 8
    while position < len(data):
        length = 12 + int.from_bytes(data[position : position + 4], "big")
        places.append((position, length))
        position += length
    return places


@given(place=st.integers(8, len(encoded(".png")) - 1), bit=st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_a_png_with_one_wrong_bit_is_refused(place, bit):
    data = bytearray(encoded(".png"))
    data[place] ^= 1 << bit
    with pytest.raises(FrameError):
        compressed_to_rgb(compressed(data))


def test_a_png_that_lost_a_whole_chunk_is_refused():
    """The checksums of the others are right."""
    data = cv2.imencode(".png", street())[1].tobytes()
    places = png_chunks(data)
    assert len(places) > 5
    for place, length in places:
        with pytest.raises(FrameError):
            compressed_to_rgb(compressed(data[:place] + data[place + length :]))


def test_without_simplejpeg_a_jpeg_is_refused_and_a_png_is_not(monkeypatch):
    monkeypatch.setattr(decoding, "simplejpeg", None)
    monkeypatch.setattr(decoding, "_MISSING", "No module named 'simplejpeg'", raising=False)
    assert_like_smooth_picture(compressed_to_rgb(compressed(encoded(".png"))))
    for refuse in (check_compressed, compressed_to_rgb):
        with pytest.raises(FrameError, match="run `pip install simplejpeg`"):
            refuse(compressed(encoded(".jpg")))


def exif(orientation):
    """The segment that tells how a camera was held (TIFF, big-endian: one entry, tag 0x112)."""
    tiff = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" + bytes([orientation]) + bytes(6)
    return b"\xff\xe1" + (len(tiff) + 8).to_bytes(2, "big") + b"Exif\0\0" + tiff


def test_a_jpeg_is_turned_as_its_exif_says_and_refused_where_it_is_damaged():
    data = encoded(".jpg")
    turned = data[:2] + exif(6) + data[2:]
    expected = np.rot90(compressed_to_rgb(compressed(data)), -1)
    np.testing.assert_array_equal(compressed_to_rgb(compressed(turned)), expected)
    whole = STREETS["baseline"]
    with pytest.raises(FrameError, match="cut off or corrupt"):
        compressed_to_rgb(compressed(whole[:2] + exif(6) + whole[2:9000] + whole[12000:]))


def test_a_png_with_alpha_or_a_palette_keeps_its_colours():
    with_palette = zlib.compress(b"".join(b"\0" + bytes([row >= 32] * 64) for row in range(48)))
    chunks = [(b"IHDR", (64).to_bytes(4, "big") + (48).to_bytes(4, "big") + b"\x08\x03\0\0\0")]
    chunks += [(b"PLTE", bytes([200, 0, 0, 0, 0, 150])), (b"IDAT", with_palette), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big") for name, body in chunks
    )
    assert_like_smooth_picture(compressed_to_rgb(compressed(data)))
    clear = cv2.imencode(".png", with_alpha(smooth_picture()[..., ::-1]))[1]
    np.testing.assert_array_equal(compressed_to_rgb(compressed(clear)), smooth_picture())


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x89PN"])
def test_a_few_bytes_are_no_image(data):
    with pytest.raises(FrameError, match="neither JPEG nor PNG"):
        compressed_to_rgb(compressed(data))


def test_a_header_that_asks_for_gigabytes_is_refused_before_decoding():
    jpeg = bytearray(encoded(".jpg"))
    start_of_frame = jpeg.index(b"\xff\xc0")
    jpeg[start_of_frame + 5 : start_of_frame + 9] = b"\xff\xf0\xff\xf0"
    png = bytearray(encoded(".png"))
    png[16:24] = (60000).to_bytes(4, "big") * 2
    for data, side in ((jpeg, 65520), (png, 60000)):
        with pytest.raises(FrameError, match=f"{side} x {side} pixels, expected 1 to {MAX_FRAME_SIDE_PX}"):
            compressed_to_rgb(compressed(data))


@pytest.mark.parametrize(
    "format",
    [
        "16UC1; png compressed",
        "16UC1; png compressed ",
        "32FC1; compressedDepth png",
        "16UC1; compressedDepth rvl",
        "compressedDepth",
        "16SC1; png compressed mono16",
        "8UC2; jpeg compressed",
        "bayer_rggb8; jpeg compressed bayer_rggb8",
        "bayer_grbg16; png compressed",
        "depth",
        "disparity; png compressed",
        "h264",
        "H.265",
        "hevc; 1280x720",
        "webp",
        "rgb8; tiff compressed rgb8",
        "image/avif",
    ],
)
@pytest.mark.parametrize("extension", [".jpg", ".png"])
def test_what_is_no_colour_or_grey_picture_by_its_format_is_refused(format, extension):
    message = compressed(encoded(extension), format)
    for refuse in (check_compressed, compressed_to_rgb):
        with pytest.raises(FrameError, match="is not for this policy, expected a colour or grey image as JPEG or PNG"):
            refuse(message)


@pytest.mark.parametrize(
    "format",
    [
        *("", "jpeg", "jpg", "JPEG", "png", "image/jpeg", "mjpeg", "rgb8", "bgr8", "my_camera"),
        *("rgb8; jpeg compressed bgr8", "bgr8; jpeg compressed ", "mono8; png compressed mono8"),
        *("bgra8; jpeg compressed bgr8", "8UC3; jpeg compressed bgr8", "yuv422_yuy2; jpeg compressed bgr8"),
        "nv12; jpeg compressed bgr8",
    ],
)
@pytest.mark.parametrize("extension", [".jpg", ".png"])
def test_the_bytes_tell_jpeg_from_png_and_not_the_words(format, extension):
    message = compressed(encoded(extension), format)
    check_compressed(message)
    assert_like_smooth_picture(compressed_to_rgb(message))


def test_a_format_of_any_length_makes_a_short_sentence():
    with pytest.raises(FrameError) as caught:
        check_compressed(compressed(encoded(".jpg"), "depth" * 100_000))
    assert len(str(caught.value)) < 300


def test_a_deep_grey_png_is_a_picture_only_where_its_format_says_so(tmp_path):
    grey = np.full((16, 24), 0x1234, np.uint16)
    data = cv2.imencode(".png", grey)[1].tobytes()
    rgb = compressed_to_rgb(compressed(data, "mono16; png compressed mono16"))
    np.testing.assert_array_equal(rgb, np.full((16, 24, 3), 0x12))
    for format in ("png", "", "jpeg", "mono8; png compressed"):
        with pytest.raises(FrameError, match="grey PNG of 16 bits, which is how depth cameras write distances"):
            check_compressed(compressed(data, format))
    (tmp_path / "depth.png").write_bytes(data)
    with pytest.raises(FrameError, match=r"depth\.png is a grey PNG of 16 bits"):
        read_image(tmp_path / "depth.png")
    colour = cv2.imencode(".png", np.full((16, 24, 3), 0x1234, np.uint16))[1].tobytes()
    np.testing.assert_array_equal(compressed_to_rgb(compressed(colour, "bgr16; png compressed")), rgb)


@given(data=st.binary(max_size=200), extension=st.sampled_from([".jpg", ".png"]), place=st.integers(0, 10_000))
@settings(max_examples=200, deadline=None)
def test_corrupt_compressed_bytes_give_a_frame_or_a_frame_error(data, extension, place):
    whole = bytearray(encoded(extension))
    place %= len(whole)
    whole[place : place + len(data)] = data
    try:
        rgb = compressed_to_rgb(compressed(whole))
    except FrameError:
        return
    assert rgb.dtype == np.uint8
    assert rgb.ndim == 3


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8"])
@pytest.mark.parametrize("rgb", [RGB, RGB[:, ::2], RGB[::-1]])
def test_a_frame_survives_the_way_through_a_message(encoding, rgb):
    message = rgb_to_image(rgb, new_message, "stamp", "camera", encoding)
    assert (message.header.stamp, message.header.frame_id) == ("stamp", "camera")
    assert (message.height, message.width, message.step) == (rgb.shape[0], rgb.shape[1], rgb.shape[1] * 3)
    assert isinstance(message.data, array.array)
    np.testing.assert_array_equal(image_to_rgb(message), rgb)


def test_an_encoding_that_is_not_published_is_refused():
    with pytest.raises(ValueError, match="'mono8', expected 'rgb8' or 'bgr8'"):
        rgb_to_image(RGB, new_message, None, "", "mono8")


def test_a_frame_survives_the_way_through_a_compressed_message():
    message = rgb_to_compressed(smooth_picture(), new_message, "stamp", "camera")
    assert (message.header.stamp, message.header.frame_id) == ("stamp", "camera")
    assert message.format == "rgb8; jpeg compressed bgr8"
    assert_like_smooth_picture(compressed_to_rgb(message))


def test_the_real_message_types_take_what_we_fill_in():
    builtin_interfaces = pytest.importorskip("builtin_interfaces.msg")
    sensor_msgs = pytest.importorskip("sensor_msgs.msg")
    stamp = builtin_interfaces.Time(sec=3)
    message = rgb_to_image(RGB, sensor_msgs.Image, stamp, "camera", "bgr8")
    np.testing.assert_array_equal(image_to_rgb(message), RGB)
    message = rgb_to_compressed(smooth_picture(), sensor_msgs.CompressedImage, stamp, "camera")
    assert compressed_to_rgb(message).shape == (48, 64, 3)


def test_conversions_import_without_ros():
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['rclpy', 'sensor_msgs', 'cv_bridge', 'torch']));"
        "import mobile_vla_inference.ros.conversions"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
