"""Images: the same pixels as timm's own preprocessing, and nothing skipped in silence."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import tomexport
from tomexport import pipeline
from tomexport.calib.images import ImageError, ImageFolder, prepare
from tomexport.exporter.zoo import preprocessing, timm


@pytest.fixture
def photograph(tmp_path):
    from skimage import data

    path = tmp_path / "coffee.png"
    Image.fromarray(data.coffee()).save(path)  # 600 × 400
    return path


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "vit_base_patch16_384", "vit_base_patch16_siglip_224"]
)
@pytest.mark.parametrize("turned", [False, True])
def test_equals_timm(photograph, name, turned):
    if turned:
        Image.open(photograph).transpose(Image.Transpose.ROTATE_90).save(photograph)
    how = preprocessing(name)
    timm()
    from timm.data import create_transform

    transform = create_transform(
        input_size=(3, *how["size"]),
        **{key: how[key] for key in ("interpolation", "mean", "std", "crop_pct", "crop_mode")},
    )
    expected = transform(Image.open(photograph).convert("RGB")).numpy()
    found = prepare(photograph, tuple(how["size"]), how)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5


def test_a_folder_is_searched_in_order(tmp_path, photograph):
    (tmp_path / "b").mkdir()
    for name in ("b/2.PNG", "b/10.jpg", "a.webp"):
        Image.open(photograph).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = ImageFolder.find(tmp_path)
    assert [f.name for f in found.files] == ["a.webp", "10.jpg", "2.PNG", "coffee.png"]
    assert found.description == f"all of {tmp_path}"
    some = ImageFolder.find(tmp_path, limit=2)
    assert [f.name for f in some.files] == ["a.webp", "2.PNG"]
    assert some.description == f"2 of 4 in {tmp_path}"


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(ImageError, match="holds no image"):
        ImageFolder.find(tmp_path)
    with pytest.raises(ImageError, match="There is no folder"):
        ImageFolder.find(tmp_path / "absent")


def test_a_broken_image_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    with pytest.raises(ImageError, match=r"broken\.jpg is no readable image"):
        prepare(tmp_path / "broken.jpg", (224, 224), preprocessing("deit_tiny_patch16_224"))


def test_grey_and_transparent_images_become_rgb(tmp_path, photograph):
    how = preprocessing("deit_tiny_patch16_224")
    for mode in ("L", "RGBA", "P"):
        path = tmp_path / f"{mode}.png"
        Image.open(photograph).convert(mode).save(path)
        assert prepare(path, (224, 224), how).shape == (3, 224, 224)


def test_models_that_take_no_rgb_are_refused(tmp_path, photograph, seeded):
    model = tmp_path / "model.onnx"
    tomexport.export(seeded("test_vit", in_chans=1), "none", model, verify=False)
    with pytest.raises(ImageError, match="The model takes 1 channels; image files give 3"):
        ImageFolder.find(tmp_path)(pipeline.describe(model))
