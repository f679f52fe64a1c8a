"""Images: the same pixels as timm's own preprocessing, and nothing skipped in silence."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from tomexport import pipeline
from tomexport.calib.images import ImageSet, Skipped, prepare, preprocessing
from tomexport.errors import ImageError
from tomexport.exporter import zoo
from tomexport.exporter.zoo import timm


@pytest.fixture(scope="module")
def metadata(seeded, tmp_path_factory):
    """What a file says that takes 160 × 160 pixels."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    return pipeline.export(seeded("test_vit"), "none", path, verify=False).metadata


@pytest.fixture
def photograph(tmp_path):
    from skimage import data

    path = tmp_path / "coffee.png"
    Image.fromarray(data.coffee()).save(path)  # 600 × 400
    return path


def _noise(path, seed=0, shape=(12, 10, 3)):
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, "u1")).save(path)


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224", "vit_base_patch16_384", "vit_base_patch16_siglip_224",
        "eva02_base_patch14_448", "vit_so400m_patch16_siglip_gap_384",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "size", [(600, 400), (400, 600), (500, 333), (333, 501), (448, 448), (90, 61)]
)
def test_equals_timm(photograph, name, size):
    image = Image.open(photograph).convert("RGB").resize(size)
    how = zoo.preprocessing(name)
    found = prepare(image, (3, *how["size"]), how)
    assert np.abs(found - _by_timm(image, how)).max() < 1e-5


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("wanted", [(224, 224), (160, 256), (96, 64)])
@pytest.mark.parametrize("size", [(600, 400), (401, 601), (90, 61)])
def test_each_way_to_crop_is_timms(photograph, mode, wanted, size):
    image = Image.open(photograph).convert("RGB").resize(size)
    how = zoo.preprocessing("deit_tiny_patch16_224") | {"crop_mode": mode, "size": wanted}
    found = prepare(image, (3, *wanted), how)
    assert np.abs(found - _by_timm(image, how)).max() < 1e-5


def _by_timm(image, how):
    timm()
    from timm.data import create_transform

    transform = create_transform(
        input_size=(3, *how["size"]),
        **{key: how[key] for key in ("interpolation", "mean", "std", "crop_pct", "crop_mode")},
    )
    return transform(image).numpy()


def test_sixteen_bits_are_as_bright_as_eight(photograph):
    grey = Image.open(photograph).convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    how = zoo.preprocessing("deit_tiny_patch16_224")
    shape = (3, 224, 224)
    np.testing.assert_array_equal(prepare(deep, shape, how), prepare(grey, shape, how))
    for mode in ("I", "F"):
        with pytest.raises(ImageError, match=rf"32 bits \(mode {mode}\).* save it with 8 or 16"):
            prepare(grey.convert(mode), shape, how)


def test_a_folder_is_searched_in_order(tmp_path, photograph):
    (tmp_path / "b").mkdir()
    for name in ("b/2.PNG", "b/10.jpg", "a.webp"):
        Image.open(photograph).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = ImageSet.find(tmp_path)
    assert found.names == ("a.webp", "b/10.jpg", "b/2.PNG", "coffee.png")
    assert found.description == f"all of {tmp_path}"
    assert found.labels is None  # not all lie in folders


def test_a_subset_is_drawn_by_its_seed(tmp_path):
    np.savez(tmp_path / "set.npz", images=np.zeros((100, 4, 4, 3), "u1"), labels=np.arange(100))
    small = ImageSet.find(tmp_path / "set.npz", limit=10)
    larger = ImageSet.find(tmp_path / "set.npz", limit=30)
    other = ImageSet.find(tmp_path / "set.npz", limit=10, seed=1)
    assert small.labels == tuple(sorted(small.labels))
    assert set(small.labels) < set(larger.labels)
    assert set(small.labels) != set(other.labels)
    assert small.names[0] == f"images[{small.labels[0]}]"
    assert small.description == f"10 of 100 in {tmp_path / 'set.npz'}"
    assert len(ImageSet.find(tmp_path / "set.npz", limit=None)) == 100


@pytest.mark.parametrize(
    ("limit", "seed", "words"), [(0, 0, "leaves no image"), (5, -1, "Seed -1 is negative")]
)
def test_impossible_subsets_are_refused(tmp_path, photograph, limit, seed, words):
    with pytest.raises(ImageError, match=words):
        ImageSet.find(tmp_path, limit=limit, seed=seed)


def test_sources_without_images_are_refused(tmp_path):
    with pytest.raises(ImageError, match="holds no image"):
        ImageSet.find(tmp_path)
    with pytest.raises(ImageError, match="There is no folder"):
        ImageSet.find(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ImageError, match="takes a folder of images, or an"):
        ImageSet.find(tmp_path / "notes.txt")


def test_streamed_in_batches_and_stacked_alike(tmp_path, metadata):
    for i in range(5):
        _noise(tmp_path / f"{i}.png", i)
    images = ImageSet.find(tmp_path)
    said = []
    batches = list(images.batches(metadata, 2, said.append))
    assert [batch.indices for batch in batches] == [(0, 1), (2, 3), (4,)]
    assert said == ["image 1 of 5", "image 3 of 5", "image 5 of 5"]
    stacked, what = images(metadata)
    assert what == f"all of {tmp_path}"
    assert np.array_equal(np.concatenate([b.pixels for b in batches]), stacked)
    assert np.array_equal(images.take([3, 1])(metadata)[0], stacked[[3, 1]])


def test_unreadable_images_are_named_and_left_out(tmp_path, metadata):
    for i in range(3):
        _noise(tmp_path / f"{i}.png", i)
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    images = ImageSet.find(tmp_path)
    (batch,) = images.batches(metadata)
    assert batch.indices == (0, 2)
    assert [each.name for each in batch.skipped] == ["1.png", "broken.jpg"]
    assert "broken.jpg is no readable image" in batch.skipped[1].why
    pixels, what = images(metadata)
    assert len(pixels) == 2
    assert what == f"all of {tmp_path}, less 2 unreadable: 1.png, broken.jpg"
    assert images.described([Skipped(f"{i}", "") for i in range(5)]).endswith(
        "5 unreadable: 0, 1, 2, …"
    )


def test_nothing_readable_is_refused(tmp_path, metadata):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    with pytest.raises(ImageError, match=r"None of the 1 images of .*broken\.jpg is no"):
        ImageSet.find(tmp_path)(metadata)


def test_grey_and_transparent_images_become_rgb(tmp_path, photograph):
    how = zoo.preprocessing("deit_tiny_patch16_224")
    for mode in ("L", "RGBA", "P"):
        assert prepare(Image.open(photograph).convert(mode), (3, 224, 224), how).shape[0] == 3


def test_a_model_of_one_channel_takes_grey(photograph):
    how = zoo.preprocessing("deit_tiny_patch16_224")  # three means and three deviations
    found = prepare(Image.open(photograph), (1, 32, 48), how)
    grey = prepare(Image.open(photograph).convert("L"), (3, 32, 48), how | {
        "mean": [np.mean(how["mean"])] * 3, "std": [np.mean(how["std"])] * 3,
    })  # fmt: skip
    assert found.shape == (1, 32, 48)
    assert np.abs(found[0] - grey[0]).max() < 1e-6


def test_other_numbers_of_channels_are_refused(tmp_path, photograph, metadata):
    four = dataclasses.replace(metadata, input_shape=(1, 4, 32, 32))
    with pytest.raises(ImageError, match="The model takes 4 channels; images give 3"):
        ImageSet.find(tmp_path)(four)
    spectrograms = dataclasses.replace(metadata, preprocessing={"mean": [-4.27]})
    with pytest.raises(ImageError, match=r"takes a signal of mean -4.27: no pixels"):
        ImageSet.find(tmp_path)(spectrograms)


def test_images_too_long_to_resize_are_left_out(tmp_path, metadata):
    Image.new("1", (30_000, 1)).save(tmp_path / "line.png")
    _noise(tmp_path / "good.png")
    (batch,) = ImageSet.find(tmp_path).batches(metadata)
    assert batch.indices == (0,)
    assert "is 30000×1 pixels, too long and thin" in batch.skipped[0].why


def test_unknown_preprocessing_takes_the_whole_image(metadata):
    unknown = dataclasses.replace(metadata, preprocessing=None, candidates={})
    assert preprocessing(unknown)["crop_pct"] == 1.0
    several = dataclasses.replace(metadata, preprocessing=None, candidates={"a": {"mean": [1]}})
    assert preprocessing(several) == {"mean": [1]}


def test_an_npz_gives_pixels_and_labels(tmp_path, metadata):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 160, 160, 3), "u1")
    np.savez(tmp_path / "set.npz", images=pixels, labels=np.array([3, 1, 2, 0]))
    images = ImageSet.find(tmp_path / "set.npz")
    assert images.labels == (3, 1, 2, 0)
    assert images.notes == ("labels are those of set.npz",)
    how = {"crop_pct": 1.0, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    found, _ = images(dataclasses.replace(metadata, preprocessing=how))
    assert np.abs(found - (pixels.transpose(0, 3, 1, 2) / 127.5 - 1)).max() < 1e-5
    np.savez(tmp_path / "grey.npz", images=pixels[..., 0])
    grey = ImageSet.find(tmp_path / "grey.npz")
    assert grey.labels is None
    assert grey(metadata)[0].shape == (4, 3, 160, 160)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((2, 4, 4, 3))}, "must be uint8"),
        ({"images": np.zeros((2, 4, 4, 4), "u1")}, "must be uint8"),
        ({"images": np.zeros((0, 4, 4, 3), "u1")}, "must be uint8"),
        ({"pictures": np.zeros((2, 4, 4, 3), "u1")}, "with an array `images`"),
        ({"images": np.zeros((2, 4, 4, 3), "u1"), "labels": np.zeros(3, int)}, "one class index"),
        ({"images": np.zeros((2, 4, 4, 3), "u1"), "labels": np.zeros(2)}, "one class index"),
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(ImageError, match=words):
        ImageSet.find(tmp_path / "set.npz")


def test_a_damaged_npz_is_refused(tmp_path):
    (tmp_path / "set.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ImageError, match="with an array `images`"):
        ImageSet.find(tmp_path / "set.npz")


def test_a_csv_beside_an_npz_is_refused(tmp_path):
    np.savez(tmp_path / "set.npz", images=np.zeros((2, 4, 4, 3), "u1"))
    with pytest.raises(ImageError, match="carries its own labels"):
        ImageSet.find(tmp_path / "set.npz", labels="labels.csv")


def test_labels_beside_the_images_are_found(tmp_path):
    for name in "ab":
        _noise(tmp_path / f"{name}.png")
    (tmp_path / "labels.csv").write_text("file,class_index\nb.png,7\na.png,3\n")
    assert ImageSet.find(tmp_path).labels == (3, 7)
    (tmp_path / "other.csv").write_text("file,kind,colour\nb.png,1,2\na.png,3,4\n")
    assert ImageSet.find(tmp_path, labels=f"{tmp_path / 'other.csv'}:colour").labels == (4, 2)
    drawn = ImageSet.find(tmp_path, limit=1)
    assert drawn.labels == ((3,) if drawn.names == ("a.png",) else (7,))


def test_class_folders_in_sorted_order(tmp_path):
    for name in ("cat/1.png", "ant/inner/2.png", "bee/3.png"):
        _noise(tmp_path / name)
    images = ImageSet.find(tmp_path)
    assert dict(zip(images.names, images.labels, strict=True)) == {
        "ant/inner/2.png": 0, "bee/3.png": 1, "cat/1.png": 2,
    }  # fmt: skip
    assert images.n_names == 3
    (note,) = images.notes
    assert note == "labels are the 3 class folders in sorted order: ant is 0, cat is 2"


def test_what_is_stored_decides_the_digest(tmp_path):
    for name in "ab":
        _noise(tmp_path / f"{name}.png")
    images = ImageSet.find(tmp_path)
    before = images.digest([0]), images.digest([1])
    assert before[0] != before[1]
    _noise(tmp_path / "b.png", seed=1)
    assert images.digest([0]) == before[0]
    assert images.digest([1]) != before[1]
    (tmp_path / "b.png").unlink()
    assert images.digest([1]) not in before
