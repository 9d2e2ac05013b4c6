"""Camera messages to RGB and back, with plain objects in place of messages and the real messages where they count."""

from __future__ import annotations

import array
import subprocess
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobile_vla_inference.border import MAX_FRAME_SIDE_PX, FrameError
from mobile_vla_inference.ros.conversions import compressed_to_rgb, image_to_rgb, rgb_to_compressed, rgb_to_image

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


def test_nv21_reads_the_colour_rows_below_the_luma():
    for (y, u, v), rgb in YUV_COLOURS:
        luma = np.full((4, 6), y, dtype=np.uint8)
        chroma = np.tile(np.array([v, u], dtype=np.uint8), (2, 3))
        result = image_to_rgb(image("nv21", np.vstack([luma, chroma]), padding=2, height=4))
        assert result.shape == (4, 6, 3)
        np.testing.assert_allclose(result, np.broadcast_to(rgb, result.shape), atol=3)


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
    ],
)
def test_a_malformed_image_is_refused_with_a_sentence(message, sentence):
    with pytest.raises(FrameError, match=sentence):
        image_to_rgb(message)


@given(
    encoding=st.sampled_from(["rgb8", "bgra8", "mono16", "bayer_rggb8", "bayer_gbrg16", "yuv422", "yuyv", "nv21"]),
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
    assert image_to_rgb(image("nv24", RGB)) is RGB


def test_a_missing_cv_bridge_is_told_with_the_encodings_that_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv_bridge", None)
    with pytest.raises(FrameError, match=r"encoding is 'nv24' and cv_bridge can't convert it.*expected one of rgb8"):
        image_to_rgb(image("nv24", RGB))


@pytest.mark.parametrize("fault", [ImportError, AttributeError, TypeError, RuntimeError])
def test_a_cv_bridge_that_fails_is_told_with_its_reason(monkeypatch, fault):
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


def test_a_format_that_is_neither_jpeg_nor_png_is_refused():
    with pytest.raises(FrameError, match=r"'16UC1; compressedDepth' .* neither JPEG nor PNG"):
        compressed_to_rgb(compressed(bytes(12) + encoded(".png"), format="16UC1; compressedDepth"))


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
