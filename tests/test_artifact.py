"""What a file carries: metadata and golden set as text, and the images that are drawn again."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tomexport.artifact import FORMAT_VERSION, N_GOLDEN, Golden, Metadata, golden_images
from tomexport.errors import ArtifactError
from tomexport.plan import TWO_SET, Cost, ModelCost, Plan, Schedule, Site

SHAPE = (3, 64, 64)

images_of = lru_cache(golden_images)


# --- metadata


def metadata(**changes: Any) -> Metadata:
    sites = tuple(Site(0, i, f"blocks.{i}", 197, 1, 1, Cost(5, 3, 7)) for i in range(12))
    model = ModelCost("deit", sites, fixed=100, pool=2)
    whole = Metadata(
        plan=Plan.make(model, Schedule.parse("const:16"), "tome", TWO_SET),
        names=("deit_small_patch16_224", "vit_small_patch16_224"),
        input_shape=(1, 3, 224, 224),
        output="logits",
        ops="custom",
        prop_attn=True,
        half=False,
        decisions=("decision_0", "decision_1"),
        weights='épreuve × 2 "quoted"\n',
        weights_sha256="0" * 64,
        preprocessing={"mean": [0.485, 0.456, 0.406], "crop_pct": 0.9, "interpolation": "bicubic"},
        candidates={},
        versions={"torch": "2.13.0"},
        opset=18,
    )
    return dataclasses.replace(whole, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"input_shape": (None, 3, 224, 224)},
        {"preprocessing": None, "candidates": {"a": {"mean": [0.5]}, "b": {"mean": [0.4]}}},
        {"decisions": (), "names": ()},
        {"prop_attn": False, "half": True, "ops": "portable", "output": "features"},
    ],
    ids=["plain", "dynamic-batch", "unknown-preprocessing", "nothing-reduced", "other-choices"],
)
def test_metadata_survives_json(changes: dict[str, Any]) -> None:
    original = metadata(**changes)
    text = original.to_json()
    assert Metadata.from_json(text) == original
    assert Metadata.from_json(text).to_json() == text


def test_metadata_is_one_readable_document() -> None:
    text = metadata().to_json()
    data = json.loads(text)
    fields = {field.name for field in dataclasses.fields(Metadata)}
    assert set(data) == fields | {"format_version"}
    assert data["format_version"] == FORMAT_VERSION
    assert data["plan"]["removed_total"] == 186
    assert "épreuve × 2" in text


@pytest.mark.parametrize("newer", [1, 7])
def test_metadata_of_a_newer_format_is_refused(newer: int) -> None:
    data = {"format_version": FORMAT_VERSION + newer, "what": "is not known here"}
    with pytest.raises(ArtifactError) as caught:
        Metadata.from_json(json.dumps(data))
    assert str(caught.value) == (
        f"The file's metadata is of format {FORMAT_VERSION + newer}; this tomexport reads up to "
        f"{FORMAT_VERSION}. Update it: pip install -U tomexport"
    )


def assert_unreadable(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"(?s)^The file's metadata cannot be read \(.*export"):
        Metadata.from_json(text)


@pytest.mark.parametrize(
    "text",
    ["", " ", "garbage", "\0", "null", "1", '"text"', "[]", "[1]", "{}", "{", '{"a": }'],
    ids=repr,
)
def test_metadata_that_is_garbage_is_refused(text: str) -> None:
    assert_unreadable(text)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_metadata_cut_short_is_refused(share: float) -> None:
    text = metadata().to_json()
    assert_unreadable(text[: int(share * len(text))])


@pytest.mark.parametrize(
    "name",
    [
        "format_version",
        *(f.name for f in dataclasses.fields(Metadata) if f.default is dataclasses.MISSING),
    ],
)
def test_metadata_without_a_field_is_refused(name: str) -> None:
    data = json.loads(metadata().to_json())
    del data[name]
    assert_unreadable(json.dumps(data))


def test_files_from_before_there_were_permutations_are_read() -> None:
    data = json.loads(metadata().to_json())
    assert data.pop("permutation_seed") is None
    for name in ("flops_slides", "flops_slides_unreduced"):
        del data["plan"][name]
    for site in data["plan"]["sites"]:
        del site["slices"], site["multiple"], site["restored"]
    read = Metadata.from_json(json.dumps(data))
    assert read.permutation_seed is None
    assert read.plan.macs == metadata().plan.macs


@pytest.mark.parametrize("name", ["sites", "notes", "n_prefix", "macs", "schedule"])
def test_metadata_whose_plan_lacks_a_field_is_refused(name: str) -> None:
    data = json.loads(metadata().to_json())
    del data["plan"][name]
    assert_unreadable(json.dumps(data))


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": None},
        {"plan": []},
        {"plan": "const:8"},
        {"names": None},
        {"input_shape": 224},
        {"format_version": "1"},
        {"format_version": None},
        {"a_field": "that is not known"},
    ],
    ids=str,
)
def test_metadata_of_wrong_types_is_refused(changes: dict[str, Any]) -> None:
    assert_unreadable(json.dumps(json.loads(metadata().to_json()) | changes))


# --- golden set


def golden(n_targets: int = 12, count: int = 2, shape: tuple[int, int, int] = (1, 8, 8)) -> Golden:
    random = np.random.default_rng(n_targets)
    margins = random.random((n_targets, count), np.float32)
    margins[:1] = np.inf  # where no other decision was possible
    return Golden(
        images=images_of(shape, count),
        reduced=random.standard_normal((count, 10), np.float32),
        original=random.standard_normal((count, 10), np.float32),
        targets=tuple(random.integers(0, 60 - i, (count, 60)) for i in range(n_targets)),
        margins=margins,
    )


def assert_same(found: Golden, expected: Golden) -> None:
    for name in ("images", "reduced", "original", "margins"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == np.float32
    assert len(found.targets) == len(expected.targets)
    for target, expected_target in zip(found.targets, expected.targets, strict=True):
        np.testing.assert_array_equal(target, expected_target)
        assert target.dtype == np.int64


def as_bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def as_text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def assert_damaged(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"(?s)^The file's golden set is damaged \(.*export it"):
        Golden.from_text(text, (1, 1, 8, 8))


@pytest.mark.parametrize("n_targets", [0, 1, 12])
@pytest.mark.parametrize("count", [1, 8])
def test_golden_set_survives_text(n_targets: int, count: int) -> None:
    original = golden(n_targets, count)
    text = original.to_text()
    assert text.isascii()
    assert_same(Golden.from_text(text, (None, 1, 8, 8)), original)


def test_golden_set_draws_images_of_the_input_shape() -> None:
    original = golden(1, 2, (3, 16, 24))
    assert_same(Golden.from_text(original.to_text(), (1, 3, 16, 24)), original)


def test_golden_set_holds_slots_of_large_inputs_and_nowhere() -> None:
    original = dataclasses.replace(golden(1), targets=(np.array([[-1, 0, 256, 32_767]] * 2),))
    assert_same(Golden.from_text(original.to_text(), (1, 1, 8, 8)), original)


def test_golden_text_leaves_the_images_out() -> None:
    random = np.random.default_rng(0)
    outputs = random.standard_normal((2, 8, 1000)).astype(np.float32)
    targets = tuple(random.integers(0, 189, (8, 197)) for _ in range(12))
    images = np.zeros((8, 3, 224, 224), np.float32)
    text = Golden(images, *outputs, targets, np.ones((12, 8), np.float32)).to_text()
    assert len(text) < images.nbytes / 20


@pytest.mark.parametrize(
    "text",
    ["", "AAAA", "!", "garbage", "é", as_text(b"PK\x03\x04"), as_text(b"\x93NUMPY\x01\x00")],
    ids=["empty", "zeros", "no-base64", "odd-length", "not-ascii", "zip-start", "npy-start"],
)
def test_golden_text_that_is_garbage_is_refused(text: str) -> None:
    assert_damaged(text)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.75, 0.99, 0.9999])
def test_golden_text_cut_short_is_refused(share: float) -> None:
    text = golden().to_text()
    assert_damaged(text[: int(share * len(text))])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_golden_text_with_a_foreign_character_is_refused(share: float) -> None:
    text = golden().to_text()
    place = int(share * len(text))
    assert_damaged(f"{text[:place]}*{text[place:]}")


def payload(content: bytes, name: str, share: float) -> int:
    """Return a position inside the compressed bytes of an array."""
    entry = zipfile.ZipFile(io.BytesIO(content)).getinfo(f"{name}.npy")
    name_length, extra_length = content[entry.header_offset + 26], content[entry.header_offset + 28]
    start = entry.header_offset + 30 + name_length + extra_length
    return start + int(share * (entry.compress_size - 1))


@pytest.mark.parametrize("name", ["reduced", "original", "margins", "target_0", "target_11"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_golden_text_with_a_damaged_array_is_refused(name: str, share: float) -> None:
    content = bytearray(as_bytes(golden().to_text()))
    content[payload(content, name, share)] ^= 0xFF
    assert_damaged(as_text(content))


def readable(content: bytes) -> Golden | None:
    try:
        return Golden.from_text(as_text(content), (1, 1, 8, 8))
    except ArtifactError:
        return None


@given(st.data())
def test_golden_text_with_any_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    original = golden()
    content = bytearray(as_bytes(original.to_text()))
    place = data.draw(st.integers(0, len(content) - 1), "byte")
    content[place] ^= data.draw(st.integers(1, 255), "flip")
    found = readable(content)
    if found is not None:
        assert_same(found, original)


def without(content: bytes, name: str) -> bytes:
    """Return the .npz without one of its arrays."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.namelist():
            if entry != f"{name}.npy":
                new.writestr(entry, old.read(entry))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name", ["reduced", "original", "margins", "target_0", "target_5", "target_11"]
)
def test_golden_text_without_an_array_is_refused(name: str) -> None:
    assert_damaged(as_text(without(as_bytes(golden().to_text()), name)))


# --- golden images


def patches(images: np.ndarray, side: int) -> np.ndarray:
    """Cut (B, C, H, W) into (patches, values)."""
    n, channels, height, width = images.shape
    grid = images.reshape(n, channels, height // side, side, width // side, side)
    return grid.transpose(0, 2, 4, 1, 3, 5).reshape(-1, channels * side * side)


def spectral_slope(images: np.ndarray) -> float:
    """Return log2 of the power lost per octave, over the octaves of 1 to 32 cycles per image."""
    n = images.shape[-1]
    window = np.outer(np.hanning(n), np.hanning(n))
    centred = images - images.mean(axis=(-2, -1), keepdims=True)
    power = (np.abs(np.fft.fft2(centred * window)) ** 2).mean(axis=(0, 1))
    cycles = np.fft.fftfreq(n, 1 / n)
    radius = np.hypot(cycles[:, None], cycles[None, :])
    octaves = np.arange(5)
    bands = [power[(2**o <= radius) & (radius < 2 ** (o + 1))].mean() for o in octaves]
    return float(np.polyfit(octaves, np.log2(bands), 1)[0])


def test_golden_images_never_change() -> None:
    """A file's golden set is compared with images drawn by whichever version reads it."""
    digest = hashlib.sha256(images_of(SHAPE).astype("<f4").tobytes()).hexdigest()
    assert digest == "a3bf9e9ee4c3f413d171fdd67828eef2cbbc502c046febe79b65b10f176d6a0a"


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 8, 8), (3, 48, 80), (3, 80, 48)], ids=str)
def test_golden_images_are_bytes_scaled_to_one(shape: tuple[int, int, int]) -> None:
    images = images_of(shape)
    assert images.shape == (N_GOLDEN, *shape)
    assert images.dtype == np.float32
    levels = images.astype(np.float64) * 127.5 + 127.5
    np.testing.assert_allclose(levels, levels.round(), atol=2e-5)
    assert levels.round().min() >= 0
    assert levels.round().max() <= 255


def test_golden_images_use_the_whole_range() -> None:
    for image in images_of(SHAPE):
        assert image.min() < -0.7
        assert image.max() > 0.7
        assert image.std() > 0.3


@pytest.mark.parametrize("count", [1, 5])
def test_fewer_golden_images_are_the_first_ones(count: int) -> None:
    np.testing.assert_array_equal(golden_images(SHAPE, count), images_of(SHAPE)[:count])


@pytest.mark.parametrize("side", [64, 224])
def test_golden_images_have_the_spectrum_of_photographs(side: int) -> None:
    assert -2.8 < spectral_slope(images_of((3, side, side))) < -1.5


def test_measured_spectrum_tells_noise_from_photographs(
    natural_images: Callable[[int], np.ndarray],
) -> None:
    noise = np.random.default_rng(0).standard_normal((8, 3, 64, 64))
    assert abs(spectral_slope(noise)) < 0.2
    assert -2.8 < spectral_slope(natural_images(224)) < -1.5


@pytest.mark.parametrize("side", [64, 224, 384, 512])
def test_no_two_patches_of_golden_images_are_equal(side: int) -> None:
    found = patches(images_of((3, side, side)), 16)
    assert len({patch.tobytes() for patch in found}) == len(found)


@pytest.mark.parametrize("count", [8, 16])
def test_golden_images_are_unlike_one_another(count: int) -> None:
    images = images_of(SHAPE, count).reshape(count, -1)
    likeness = np.corrcoef(images) - np.eye(count)
    assert np.abs(likeness).max() < 0.6
