"""Pictures of merged patches: right where one can tell by eye what should merge."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import tomexport
from tomexport.calib import show as showing
from tomexport.calib.images import ImageSet
from tomexport.calib.show import as_pixels, draw, paint, png, select, show
from tomexport.calib.trace import NOWHERE, Frame, Tracer
from tomexport.cli import main
from tomexport.errors import ExportError, ImageError, MissingExtraError, PlanError
from tomexport.exporter.zoo import timm
from tomexport.plan import Plan

# as the model sees them, any two are equally unlike: the corners of a tetrahedron
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
PATCH = 8
ROWS, COLUMNS = 6, 8
REGIONS = np.array(
    [
        [0, 0, 0, 0, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1, 1, 1],
        [0, 0, 2, 2, 2, 2, 1, 1],
        [0, 0, 2, 2, 2, 2, 1, 1],
        [3, 3, 3, 3, 3, 3, 3, 3],
        [3, 3, 3, 3, 3, 3, 3, 3],
    ]
)
COLOURS = np.array([RED, GREEN, BLUE, WHITE], np.uint8)
LEFT = [36, 27, 21, 17, 13, 10, 8, 7, 6, 5, 3]  # tokens; in the end too few for four regions


def _sees_colours():
    """A ViT whose keys are the colours of its patches, and whose blocks change nothing."""
    timm()
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=(ROWS * PATCH, COLUMNS * PATCH), patch_size=PATCH, embed_dim=6, num_heads=1,
        depth=len(LEFT), num_classes=2, class_token=False, global_pool="avg",
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        mean = torch.full((PATCH, PATCH), 1 / PATCH**2)
        for colour in range(3):  # and its negative, so that a norm takes no mean away
            model.patch_embed.proj.weight[colour, colour] = mean
            model.patch_embed.proj.weight[colour + 3, colour] = -mean
        for block in model.blocks:
            block.norm1.weight.fill_(1)
            block.attn.qkv.weight[6:12] = torch.eye(6)
    return model.eval()


@pytest.fixture(scope="module")
def by_eye(tmp_path_factory):
    """A file of that model, and an image of four flat regions."""
    folder = tmp_path_factory.mktemp("by_eye")
    Image.fromarray(_enlarged(COLOURS[REGIONS])).save(folder / "regions.png")
    model, schedule = folder / "model.onnx", "list:12,9,6,4,4,3,2,1,1,1,2"
    tomexport.export(_sees_colours(), schedule, model, verify=False)
    return model, folder / "regions.png"


def _enlarged(array):
    return array.repeat(PATCH, axis=0).repeat(PATCH, axis=1)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_groups_cross_no_region_until_they_must(by_eye, tmp_path, backend):
    shown = show(*by_eye, tmp_path / "shown.png", backend=backend, precision="f32")
    assert [frame.tokens for frame in shown.frames] == LEFT
    *before, last = [
        max(len(np.unique(REGIONS[frame.groups == group])) for group in range(frame.tokens))
        for frame in shown.frames
    ]
    assert set(before) == {1}
    assert last > 1, "three tokens stand for four regions"


def test_the_picture_shows_the_regions_and_nothing_else(by_eye, tmp_path):
    five = show(*by_eye, tmp_path / "shown.png", layers="9").frames[0]
    pixels = np.asarray(Image.open(by_eye[1]))
    painted = paint(pixels, five.groups, side=COLUMNS * PATCH)
    edges, regions = (_touches_another(_enlarged(a)) for a in (five.groups, REGIONS))
    assert (edges >= regions).all()
    inner = np.unique(_enlarged(REGIONS)[edges & ~regions])
    assert len(inner) == 1, "five tokens: one region has two, and a border between them"
    assert np.array_equal(painted[~edges], pixels[~edges])
    assert (painted[edges] != pixels[edges]).any(axis=1).all(), "a border is to be seen"
    sheet = np.asarray(Image.open(tmp_path / "shown.png"))
    for colour in COLOURS[:3]:  # the image beside them has as much of each, less its borders
        share = [(half == colour).all(axis=2).sum() for half in np.array_split(sheet, 2, axis=1)]
        assert share[1] > share[0] > 0


def _touches_another(labels):
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= labels[:-1] != labels[1:]
    return edge


# --- painting


def test_patches_merge_into_their_mean_and_stay_as_they_are_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)  # 10 × 10 a patch
    painted = paint(pixels, np.array([[0, 1, 0], [2, NOWHERE, 0]]), side=30)
    inside = (slice(1, 9), slice(1, 9))
    blocks = {(r, c): (slice(10 * r, 10 * r + 10), slice(10 * c, 10 * c + 10))
              for r in range(2) for c in range(3)}  # fmt: skip
    group = [blocks[place] for place in ((0, 0), (0, 2), (1, 2))]
    mean = np.concatenate([pixels[place].reshape(-1, 3) for place in group]).mean(axis=0)
    for place in group:
        assert np.abs(painted[place][inside] - mean).max() <= 1
    for place in (blocks[0, 1], blocks[1, 0]):
        assert np.array_equal(painted[place][inside], pixels[place][inside])
    dark = painted[blocks[1, 1]][inside]
    assert np.abs(dark - pixels[blocks[1, 1]][inside] / 4).max() <= 1


def test_small_images_are_enlarged_and_edges_without_patches_cut_off():
    pixels = np.zeros((33, 35, 3), np.uint8)
    assert paint(pixels, np.zeros((4, 4), int), side=288).shape == (256, 256, 3)
    assert paint(pixels, np.full((2, 2), NOWHERE), side=32).shape == (32, 32, 3)


def test_prepared_images_look_as_they_did(by_eye):
    tracer = Tracer.load(by_eye[0])
    pixels = np.asarray(Image.open(by_eye[1]))
    how = {"crop_pct": 1.0, "interpolation": "bicubic", "mean": [0.4, 0.5, 0.6], "std": [0.2] * 3}
    metadata = dataclasses.replace(tracer.metadata, preprocessing=how)
    prepared = ImageSet(by_eye[1].parent, (by_eye[1].name,), None, 1)(metadata)[0][0]
    assert np.array_equal(as_pixels(prepared, metadata), pixels)
    grey = prepared[:1] * 0
    assert set(as_pixels(grey, metadata).ravel()) == {128}, "the mean of the means"


# --- the sheet


def _frame(layer=0, groups=((0, 0), (1, 2)), waiting=False):
    groups = np.array(groups)
    return Frame(layer, f"blocks.{layer}", int(groups.max()) + 1, groups, waiting)


def _plan():
    return Plan("test_vit", "tome", "const:1", 0, tomexport.plan("test_vit", "none").steps, 1, 1)


def test_sheets_grow_with_their_layers():
    pixels = np.zeros((224, 224, 3), np.uint8)
    sizes = [draw(pixels, [_frame(i) for i in range(n)], _plan()).size for n in (1, 3, 4)]
    assert sizes[1][0] == sizes[2][0]
    assert sizes[1][1] < sizes[2][1]
    assert Image.open(io.BytesIO(png(draw(pixels, [_frame()], _plan())))).size == sizes[0]


def test_the_legend_says_what_is_to_be_seen():
    plan = _plan()
    merged, dropped = _frame(), _frame(groups=((0, NOWHERE), (1, 2)))
    waiting = _frame(groups=((0, NOWHERE), (1, 2)), waiting=True)
    assert "patches that one token stands for" in showing.legend([merged], plan)
    assert "Dark: patches that were dropped" in showing.legend([dropped], plan)
    assert "Dark: patches that wait" in showing.legend([waiting], plan)
    assert "Dark" not in showing.legend([merged], plan)
    assert showing.legend([merged], plan).startswith("101 tokens at first, 3 in the last picture")


def test_layers_are_chosen(by_eye):
    plan = tomexport.plan("test_vit", "list:0,8,0,8,0,8")  # the last is not in the file
    found = [_frame(i) for i in range(6)]
    chosen = {w: [f.layer for f in select(found, plan, w)] for w in ("all", "final", "4, 0")}
    assert chosen == {"all": [1, 3], "final": [5], "4, 0": [4, 0]}
    for wrong in ("6", "-1", "", "first", "1,,2"):
        with pytest.raises(PlanError, match="is no layer of test_vit: write all, final, or"):
            select(found, plan, wrong)


# --- what is refused, and the command


def test_what_cannot_be_shown_is_refused_and_leaves_nothing(by_eye, tmp_path, monkeypatch):
    model, image = by_eye
    with pytest.raises(ExportError, match=r"a picture is a \.png, not '\.jpg'"):
        show(model, image, tmp_path / "shown.jpg")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ExportError, match="is a folder; name a file in it"):
        show(model, image, tmp_path / "folder.png")
    with pytest.raises(ImageError, match=r"gone\.png"):
        show(model, tmp_path / "gone.png", tmp_path / "shown.png")
    with pytest.raises(PlanError, match="is no layer"):
        show(model, image, tmp_path / "shown.png", layers="99")
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tomexport\[calib\]'"):
        show(model, image, tmp_path / "shown.png")
    assert os.listdir(tmp_path) == ["folder.png"]


def test_the_command(by_eye, tmp_path, capsys):
    model, image = map(str, by_eye)
    out = tmp_path / "shown.png"
    assert main(["show", model, image, "-o", str(out), "--layers", "0,9", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [(each["layer"], each["tokens"]) for each in said["layers"]] == [(0, 36), (9, 5)]
    assert np.shape(said["layers"][1]["groups"]) == (ROWS, COLUMNS)
    assert main(["show", model, image, "-o", str(out)]) == 2
    assert "exists already; --force replaces it" in capsys.readouterr().err
    assert main(["show", model, image, "-o", str(out), "--layers", "final", "--force"]) == 0
    assert re.search(r"blocks\.10 +10 +3 +48 ", capsys.readouterr().out)
