"""The image store: what transformers would show, exact crops, and every kind of broken or odd picture."""

import io
import pickle
import random
import warnings

import numpy as np
import pytest
from PIL import Image

from megatron_agent.data.cache import BoundedCache
from megatron_agent.data.geometry import rotated_size, turn_box
from megatron_agent.data.images import ImageStore, PixelLimits, content_items, fit_size
from megatron_agent.errors import ConfigError, DataError
from megatron_agent.types import ImageRef

LIMITS = PixelLimits(3136, 12845056)


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path / "store", LIMITS)


def encoded(picture, format="PNG", **options):
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def numbered(width, height):
    """A picture whose pixels say where they are: red is the column, green the row."""
    array = np.zeros((height, width, 3), np.uint8)
    array[..., 0] = np.arange(width) % 256
    array[..., 1] = (np.arange(height) % 256)[:, None]
    return Image.fromarray(array)


# ---------------------------------------------------------------- sizes
def test_fit_size_is_that_of_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rng = random.Random(0)
    limits = [LIMITS, PixelLimits(3136, 3136), PixelLimits(200704, 1003520), PixelLimits(1, 784)]
    for _ in range(3000):
        limit = rng.choice(limits)
        width = int(10 ** rng.uniform(0, 4))
        height = max(1, int(width * 10 ** rng.uniform(-2.2, 2.2)))
        if max(width, height) / min(width, height) <= 200:
            expected = smart_resize(height, width, 28, limit.min_pixels, limit.max_pixels)
            assert fit_size(width, height, limit) == expected[::-1], (width, height, limit)


@pytest.mark.parametrize(("size", "shown"), [((224, 224), (224, 224)), ((3, 3), (56, 56)), ((1000, 700), (1008, 700)),
                                             ((8000, 4000), (5068, 2520))])  # fmt: skip
def test_fit_size_numbers(size, shown):
    assert fit_size(*size, LIMITS) == shown


@pytest.mark.parametrize("size", [(201, 1), (10, 2010), (0, 5)])
def test_fit_size_refuses(size):
    with pytest.raises(DataError, match=f"{size[0]}x{size[1]}"):
        fit_size(*size, LIMITS)


@pytest.mark.parametrize("limits", [(0, 3136), (3137, 3136), (1, 783)])
def test_pixel_limits_refuse(limits):
    with pytest.raises(ConfigError, match=f"max_pixels={limits[1]}"):
        PixelLimits(*limits)


# ---------------------------------------------------------------- put
def test_put_keeps_the_bytes_once(store, tmp_path):
    data = encoded(numbered(100, 60), "JPEG")
    ref = store.put(data)
    assert ref == store.put(data) == ImageRef(ref.source, 112, 56)
    assert store.bytes_of(ref.source) == data and ref.source in store and "0" * 64 not in store
    assert [path.name for path in (tmp_path / "store").rglob("*") if path.is_file()] == [ref.source]
    fresh = pickle.loads(pickle.dumps(store))
    assert fresh.put(data) == ref and fresh.original_size_px(ref.source) == (100, 60)
    with pytest.raises(DataError, match="is not in the image store"):
        store.bytes_of("ab" * 32)


def test_limits_may_be_given_with_the_picture(store):
    assert store.put(encoded(numbered(224, 224)), PixelLimits(784, 3136)).width_px == 56


def test_pickle_takes_no_picture(store):
    ref = store.put(encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8))))
    store.pixels(ref)
    assert len(pickle.dumps(store)) < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(store)).pixels(ref), store.pixels(ref))


def test_damaged_copy_is_replaced(store):
    data = encoded(numbered(40, 40))
    ref = store.put(data)
    store._path(ref.source).write_bytes(data[:10])
    assert store.put(data) == ref and store.bytes_of(ref.source) == data


def test_put_bytes_checks_the_hash(store):
    data = encoded(numbered(40, 40))
    source = store.put(data).source
    store._path(source).unlink()
    store.put_bytes(source, data)
    assert store.original(source).size == (40, 40)
    with pytest.raises(DataError, match="another hash"):
        store.put_bytes(source, data + b" ")


def bomb():
    header = encoded(Image.new("1", (1, 1)))
    at = header.index(b"IHDR") + 4
    import zlib

    body = (20000).to_bytes(4, "big") * 2 + header[at + 8 : at + 13]
    return header[:at] + body + zlib.crc32(b"IHDR" + body).to_bytes(4, "big") + header[at + 17 :]


BROKEN = {
    "empty": b"",
    "text": b"<html>404</html>",
    "truncated jpeg": encoded(numbered(200, 200), "JPEG")[:-800],
    "truncated png": encoded(Image.effect_noise((200, 200), 50))[:-3000],
    "png header only": encoded(numbered(20, 20))[:20],
    "bit rot": encoded(Image.effect_noise((90, 90), 50))[:300] + b"\0" * 900,
    "bomb": bomb(),
    "float": encoded(Image.new("F", (40, 40), 0.5), "TIFF"),
    "too thin": encoded(Image.new("RGB", (500, 2))),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_pictures(store, tmp_path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError):
            store.put(BROKEN[kind])
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def test_a_tiny_picture_is_enlarged(store):
    ref = store.put(encoded(Image.new("RGB", (3, 3), (10, 20, 30))))
    assert (ref.width_px, ref.height_px) == (56, 56)
    assert store.pixels(ref).shape == (56, 56, 3) and (store.pixels(ref) == (10, 20, 30)).all()


# ---------------------------------------------------------------- modes
def pixel(store, data):
    ref = store.put(data)
    return tuple(np.asarray(store.original(ref.source))[0, 0].tolist())


def test_every_mode_becomes_rgb(store):
    assert pixel(store, encoded(Image.new("RGBA", (30, 30), (200, 0, 0, 0)))) == (255, 255, 255)
    assert pixel(store, encoded(Image.new("RGBA", (30, 30), (255, 0, 0, 127)))) == (255, 128, 128)
    assert pixel(store, encoded(Image.new("LA", (30, 30), (0, 0)))) == (255, 255, 255)
    assert pixel(store, encoded(Image.new("CMYK", (30, 30), (0, 255, 255, 0)), "TIFF")) == (255, 0, 0)
    red, green, blue = pixel(store, encoded(Image.new("CMYK", (30, 30), (0, 255, 255, 0)), "JPEG"))
    assert red > 240 and green < 15 and blue < 15
    sixteen_bit = Image.fromarray(np.full((30, 30), 0x80FF, np.uint16))
    assert pixel(store, encoded(sixteen_bit)) == (128, 128, 128)
    assert pixel(store, encoded(Image.new("1", (30, 30), 1))) == (255, 255, 255)
    palette = Image.new("P", (30, 30), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert pixel(store, encoded(palette)) == (9, 8, 7)
    assert pixel(store, encoded(palette, transparency=1)) == (255, 255, 255)


def test_an_animation_is_its_first_frame(store):
    frames = [Image.new("RGB", (30, 30), color) for color in ((255, 0, 0), (0, 0, 255))]
    for format in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
        assert pixel(store, data) == (255, 0, 0), format


def test_exif_orientation_is_applied(store):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be turned clockwise
    stored = Image.new("RGB", (80, 40))
    stored.paste((255, 255, 255), (0, 0, 40, 40))
    ref = store.put(encoded(stored, "JPEG", exif=exif, quality=95))
    assert store.original_size_px(ref.source) == (40, 80)
    assert pickle.loads(pickle.dumps(store)).original_size_px(ref.source) == (40, 80)  # read from the header
    upright = np.asarray(store.original(ref.source))
    assert upright[:30].min() > 240 and upright[50:].max() < 15


def test_put_picture_keeps_pixels(store):
    picture = numbered(56, 84)
    ref = store.put_picture(picture)
    assert (ref.width_px, ref.height_px) == (56, 84) and np.array_equal(store.pixels(ref), np.asarray(picture))
    assert store.pixels(store.put_picture(Image.new("RGBA", (56, 56), (0, 0, 0, 0)))).min() == 255


# ---------------------------------------------------------------- what is shown
def test_pixels(store):
    ref = store.put(encoded(numbered(200, 120)))
    shown = store.pixels(ref)
    assert shown.shape == (112, 196, 3) and shown.dtype == np.uint8 and shown.flags.c_contiguous
    assert not shown.flags.writeable and store.pixels(ref) is shown
    assert np.array_equal(shown, np.asarray(numbered(200, 120).resize((196, 112), Image.Resampling.BICUBIC)))
    picture = store.picture(ref)
    picture.paste(0, (0, 0, 196, 112))
    assert store.pixels(ref)[5, 5].any()


def test_crop_maps_shown_to_original(store):
    ref = store.put(encoded(numbered(224, 224)), PixelLimits(784, 3136))  # shown at a quarter
    crop = store.crop(ref, (4, 4, 24, 24))
    assert crop == ImageRef(ref.source, 84, 84, (16, 16, 96, 96))
    exact = np.asarray(numbered(224, 224).crop((16, 16, 96, 96)).resize((84, 84), Image.Resampling.BICUBIC))
    assert np.array_equal(store.pixels(crop), exact)


def test_crop_rounds_outward_and_clips(store):
    ref = store.put(encoded(numbered(100, 100)))  # shown at 112 x 112
    assert store.crop(ref, (1, 1, 57, 57)).crop_box_px == (0, 0, 51, 51)  # 0.89 .. 50.89
    assert store.crop(ref, (56, 28, 84, 112)).crop_box_px == (50, 25, 75, 100)  # exact
    assert store.crop(ref, (-50.5, 10, 500, 90.25)).crop_box_px == (0, 8, 100, 81)
    assert store.crop_unscaled(ref, (10, 20, 33, 44)).crop_box_px == (10, 20, 33, 44)
    for outside in ((120, 10, 130, 20), (10, 10, 10, 20), (50, 10, 40, 20)):
        with pytest.raises(DataError):
            store.crop(ref, outside)


def test_crop_of_a_crop_is_a_recipe_on_the_original(store):
    ref = store.put(encoded(numbered(560, 560)), PixelLimits(784, 112 * 112))
    first = store.crop(ref, (28, 28, 84, 84), PixelLimits(784, 112 * 112))
    assert first == ImageRef(ref.source, 112, 112, (140, 140, 420, 420))
    second = store.crop(first, (28, 56, 56, 112))
    assert second == ImageRef(ref.source, 56, 140, (210, 280, 280, 420))  # 70 / 28 rounds to even
    assert store.crop_unscaled(first, (10, 20, 60, 70)).crop_box_px == (150, 160, 200, 210)
    assert store.original_box_px(second) == (210, 280, 280, 420)


def test_rotation(store):
    picture = numbered(112, 56)
    ref = store.put_picture(picture)
    quarter = store.rotate(ref, 90)
    assert quarter == ImageRef(ref.source, 56, 112, None, 90)
    assert np.array_equal(store.pixels(quarter), np.asarray(picture.transpose(Image.Transpose.ROTATE_90)))
    assert store.rotate(quarter, -90) == ref and store.rotate(ref, 360) == ref
    crop = store.crop(quarter, (0, 0, 28, 56))  # of the turned picture
    assert (crop.crop_box_px, crop.rotation_deg) == ((0, 0, 28, 56), 90)
    assert store.original_box_px(crop) == (56, 0, 112, 28)
    assert store.rotate(crop, 270).crop_box_px == (56, 0, 112, 28)
    cut = picture.crop((56, 0, 112, 28)).transpose(Image.Transpose.ROTATE_90)  # the same region, turned after cutting
    assert (crop.width_px, crop.height_px) == (56, 84)
    assert np.array_equal(store.pixels(crop), np.asarray(cut.resize((crop.width_px, crop.height_px), 3)))


def test_oblique_rotation_is_that_of_pillow(store):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    smooth = noise.resize((12, 9)).resize((120, 90), Image.Resampling.BICUBIC)
    ref = store.put_picture(smooth)
    for degrees in (30, 135, 200):
        turned = store.rotate(ref, degrees)
        width, height = rotated_size(120, 90, degrees)
        theirs = smooth.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
        assert abs(theirs.width - width) <= 1 and abs(theirs.height - height) <= 1
        ours = np.asarray(store.picture(turned).resize(theirs.size), float)
        inner = (slice(theirs.height // 3, -(theirs.height // 3)), slice(theirs.width // 3, -(theirs.width // 3)))
        assert np.abs(ours - np.asarray(theirs, float))[inner].mean() < 6, degrees
    assert (store.pixels(store.rotate(ref, 30))[0, 0] == 0).all()


def test_oblique_crop_shows_the_same_pixels_as_cropping_the_turned_picture(store):
    from megatron_agent.data.geometry import cut

    picture = numbered(120, 90)
    whole = np.asarray(cut(picture, 30, None))
    assert np.array_equal(np.asarray(cut(picture, 30, (20, 30, 77, 88))), whole[30:88, 20:77])
    assert turn_box((0, 0, 120, 90), (120, 90), 0, 30) == (0, 0, *rotated_size(120, 90, 30))
    assert rotated_size(100, 100, 45) == (142, 142)


# ---------------------------------------------------------------- small parts
def test_cache_is_bounded_both_ways():
    cache = BoundedCache(2, 100)
    for key, size in (("a", 10), ("b", 10)):
        cache.put(key, key, size)
    assert cache.get("a") == "a"
    cache.put("c", "c", 10)
    assert (cache.get("b"), cache.get("a"), cache.num_bytes) == (None, "a", 20)
    cache.put("d", "d", 95)
    assert (cache.get("a"), cache.get("d"), len(cache), cache.num_bytes) == (None, "d", 1, 95)
    cache.put("e", "e", 101)
    assert len(cache) == 0 and cache.num_bytes == 0


def test_content_items():
    picture = {"type": "image"}
    assert content_items("<image>\nWhat?") == [picture, {"type": "text", "text": "\nWhat?"}]
    assert content_items("a<image><image>b") == [{"type": "text", "text": "a"}, picture, picture, {"type": "text", "text": "b"}]
    assert content_items("") == []
