"""Outputs are kept as they come, and computed again where what is kept cannot be trusted."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tomexport import pipeline
from tomexport.calib import outputs
from tomexport.calib.images import ImageSet
from tomexport.calib.outputs import Engine, compute, file_engine, sha256
from tomexport.errors import BackendError, ImageError


class Counting:
    """An engine that says how many images it computed, and stops when it is told to."""

    def __init__(self, stop_after=10**9):
        self.computed, self.stop_after = 0, stop_after

    def __call__(self, images):
        if self.computed >= self.stop_after:
            raise KeyboardInterrupt
        self.computed += len(images)
        return images.mean(axis=(2, 3))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOMEXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(outputs, "CHUNK", 4)


@pytest.fixture
def metadata(merged):
    return pipeline.describe(merged)


@pytest.fixture
def images(digits):
    return ImageSet.find(digits.held_out, limit=10)


def _kept(tmp_path):
    return sorted((tmp_path / "cache" / "outputs").glob("*.npz"))


def test_a_stopped_run_goes_on(images, metadata):
    stopped = Counting(stop_after=8)
    with pytest.raises(KeyboardInterrupt):
        compute(Engine("a", {"a": 1}, stopped), images, metadata)
    again, said = Counting(), []
    found = compute(Engine("a", {"a": 1}, again), images, metadata, said.append)
    assert (stopped.computed, again.computed, found.n_kept) == (8, 2, 8)
    assert said[-1] == "a: image 9 of 10"
    assert found.indices.tolist() == list(range(10))
    expected = compute(Engine("b", {"b": 1}, Counting()), images, metadata)
    assert expected.n_kept == 0
    assert np.array_equal(found.values, expected.values)


def test_all_that_outputs_depend_on_is_in_the_name(images, metadata, digits):
    compute(Engine("a", {"version": 1}, Counting()), images, metadata)
    other = Counting()
    compute(Engine("a", {"version": 2}, other), images, metadata)
    assert other.computed == 10
    some = Counting()  # the first eight are another draw, the last chunk too
    compute(Engine("a", {"version": 1}, some), ImageSet.find(digits.held_out, 10, seed=1), metadata)
    assert some.computed == 10


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_what_is_damaged_is_computed_again(tmp_path, images, metadata, damage):
    expected = compute(Engine("a", {}, Counting()), images, metadata)
    file = _kept(tmp_path)[1]
    content = file.read_bytes()
    middle = content.index(b"NUMPY") + 140
    damaged = {
        "cut": content[:-30], "empty": b"", "other": _kept(tmp_path)[0].read_bytes()[::-1],
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }[damage]  # fmt: skip
    file.write_bytes(damaged)
    again = Counting()
    found = compute(Engine("a", {}, again), images, metadata)
    assert again.computed in (2, 4)
    assert np.array_equal(found.values, expected.values)
    assert compute(Engine("a", {}, Counting()), images, metadata).n_kept == 10


def test_images_that_cannot_be_read_are_remembered_too(tmp_path, metadata):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(np.full((8, 8, 3), 40 * i, "u1")).save(folder / f"{i}.png")
    (folder / "2.png").write_bytes(b"no image")
    first = compute(Engine("a", {}, Counting()), ImageSet.find(folder), metadata)
    again = compute(Engine("a", {}, Counting()), ImageSet.find(folder), metadata)
    for found in (first, again):
        assert found.indices.tolist() == [0, 1, 3, 4, 5]
        assert [each.name for each in found.skipped] == ["2.png"]
    assert again.n_kept == 5
    for i in range(6):
        (folder / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match="None of the 6 images"):
        compute(Engine("a", {}, Counting()), ImageSet.find(folder), metadata)


def test_what_was_used_longest_ago_goes(tmp_path, images, metadata, monkeypatch):
    compute(Engine("a", {}, Counting()), images, metadata)
    sizes = [file.stat().st_size for file in _kept(tmp_path)]
    monkeypatch.setattr(outputs, "_MOST_BYTES", sum(sizes))
    compute(Engine("b", {}, Counting()), images, metadata)
    assert len(_kept(tmp_path)) == len(sizes)
    assert compute(Engine("b", {}, Counting()), images, metadata).n_kept == 10


def test_a_cache_that_cannot_be_written_is_named(tmp_path, images, metadata):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "outputs").write_text("in the way")
    with pytest.raises(BackendError, match=r"Outputs could not be kept in .*Set TOMEXPORT_CACHE"):
        compute(Engine("a", {}, Counting()), images, metadata)


def test_a_file_of_any_batch(merged, images, metadata):
    alone = file_engine(merged, "onnxruntime", batch=1)
    three = file_engine(merged, "onnxruntime", batch=3)
    found = [compute(engine, images, metadata).values for engine in (alone, three)]
    assert found[0].shape == (10, 10)
    assert alone.name == "onnxruntime f32 standard"
    assert alone.identity["file"] == sha256(merged)
    pixels, _ = images(metadata)
    assert np.abs(three.run(pixels) - found[0]).max() < 1e-4


def test_the_weights_beside_a_file_are_part_of_it(tmp_path):
    (tmp_path / "a.xml").write_text("graph")
    (tmp_path / "a.bin").write_bytes(b"1")
    before = sha256(tmp_path / "a.xml")
    (tmp_path / "a.bin").write_bytes(b"2")
    assert sha256(tmp_path / "a.xml") != before
