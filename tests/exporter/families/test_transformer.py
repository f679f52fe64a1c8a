"""What timm's transformers share: the rule by hand, the files, the costs, what is refused."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tomexport
from tests.exporter.families import by_hand
from tomexport.errors import RewriteError
from tomexport.exporter.families import family_of
from tomexport.exporter.methods.tome import TOME
from tomexport.exporter.rewrite import ReducedModel
from tomexport.exporter.zoo import timm

# two implementations in float32: measured 2e-6 of the largest output
TOLERANCE = 1e-5
NARROW = {"embed_dim": 96, "num_heads": 3, "depth": 3}
MODELS = {
    "dinov3": ("vit_small_patch16_dinov3", NARROW | {"img_size": 96}),
    "rope-mixed": ("vit_small_patch16_rope_mixed_224", NARROW | {"img_size": 96}),
    "eva02": ("eva02_base_patch16_clip_224", NARROW | {"img_size": 96}),
    "pe-core": ("vit_pe_core_tiny_patch16_384", {"depth": 3, "img_size": 96}),
    "shared-keys": (
        "vit_base_patch16_sapiens2",
        {"embed_dim": 96, "num_heads": 4, "num_kv_heads": 2, "depth": 3, "img_size": (96, 64)},
    ),
    "beit": ("beit_base_patch16_224", NARROW | {"img_size": 96}),
    "relpos": ("vit_relpos_base_patch16_cls_224", NARROW | {"img_size": 96}),
    "relpos-table": (
        "vit_relpos_base_patch16_224",
        NARROW | {"img_size": 96, "rel_pos_type": "bias"},
    ),
    "relpos-shared": ("vit_srelpos_small_patch16_224", NARROW | {"img_size": (96, 64)}),
    "relpos-norm-last": ("vit_relpos_small_patch16_rpn_224", NARROW | {"img_size": 96}),
    "side-by-side": ("vit_base_patch16_xp_224", NARROW | {"img_size": 96}),
    "several": ("vit_small_patch16_18x2_224", NARROW | {"img_size": 96}),
    "differential": ("vit_dwee_patch16_reg1_gap_256", NARROW | {"img_size": 96}),
    "differential-side-by-side": ("vit_dpwee_patch16_reg1_gap_256", NARROW | {"img_size": 96}),
}
OTHERS = {
    "norm-last": ("vit_base_patch16_rpn_224", NARROW | {"img_size": 96}),
    "eva-norm-last": ("eva02_enormous_patch14_clip_224", NARROW | {"img_size": 84}),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"depth": 3, "img_size": 192}),
    "hybrid-resnet": ("vit_small_resnet26d_224", NARROW | {"img_size": 192}),
    "naflex": ("naflexvit_base_patch16_map", NARROW),
    "naflex-class": ("naflexvit_base_patch16_radio_v3", NARROW),
}
ALL = MODELS | OTHERS


@pytest.fixture
def model(request, seeded):
    name, options = ALL[request.param]
    return seeded(name, **options)


def _images(model, natural_images):
    height, width = family_of(model).input_shape(model)[1:]
    return torch.from_numpy(natural_images(max(height, width))[:, :, :height, :width].copy())


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_logits_equal_the_rule_by_hand(model, natural_images):
    image = _images(model, natural_images)[:1]
    reduced = tomexport.reduce(model, "const:4")
    with torch.no_grad():
        expected = by_hand.forward(model, image, [4, 4, 4])
        found, original = reduced(image), model(image)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert (found - original).abs().max() > 1e-3, "merging changed nothing"


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_signals_equal_those_by_hand(model, natural_images):
    """At each site where ToMe merges: what other methods would look at there."""
    image, seen, views = _images(model, natural_images)[:1], [], []

    def reduce(view):
        views.append(view)
        return TOME.reduce(view)

    n_prefix = model.num_prefix_tokens  # without, there is no class token
    names = [n for n in family_of(model).signals if n_prefix or n != "class_attention"]
    spy = dataclasses.replace(TOME, needs=tuple(names), reduce=reduce)
    with torch.no_grad():
        by_hand.forward(model, image, [4, 4, 4], seen)
        ReducedModel(model, tomexport.plan(model, "const:4"), spy)(image)
        assert len(views) >= 2  # the last block may compute the class token alone
        for view, expected in zip(views, seen, strict=False):
            _same(view.x[0], expected.x)
            for name in ("keys", "queries", "values"):
                _same(getattr(view.signals, name)[0].transpose(0, 1), getattr(expected, name))
            if "normed" in names:
                _same(view.signals.normed[0], expected.normed)
            if "class_attention" in names:
                of_class = torch.stack([each[0] for each in expected.maps])
                _same(view.signals.class_attention()[0], of_class)


def _same(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("model", ALL, indirect=True)
def test_nothing_removed_is_the_original(model, natural_images):
    image = _images(model, natural_images)[:2]
    with torch.no_grad():
        expected, found = model(image), tomexport.reduce(model, "none")(image)
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("model", ["eva02", "beit", "relpos", "several", "naflex"], indirect=True)
def test_tokens_of_nothing_removed_are_the_originals(model, natural_images):
    image = _images(model, natural_images)[:1]
    reduced = tomexport.reduce(model, "none", output_kind="tokens")
    with torch.no_grad():
        expected, found = reduced.original(model, image), reduced(image)
    assert found.shape[1] == reduced.plan.steps[0].tokens_in - model.num_prefix_tokens
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("model", ALL, indirect=True)
def test_macs_are_those_that_run(model):
    """Counted by PyTorch's dispatcher, with merging for free, so that only the model is counted."""
    model = copy.deepcopy(model).requires_grad_(False)  # the counter follows gradients
    reduced = tomexport.reduce(model, "const:4", method="bound:tome")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        reduced(torch.zeros(1, *reduced.input_shape))
    assert reduced.plan.macs - reduced.plan.macs_spared == counter.get_total_flops() // 2


@pytest.mark.parametrize("model", ALL, indirect=True)
def test_folded_weights_compute_the_same_and_leave_the_model_alone(model, natural_images):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    image = _images(model, natural_images)[:1]
    reduced = tomexport.reduce(model, "const:4")
    folded = reduced.folded()
    with torch.no_grad():
        expected, found = reduced(image), folded(image)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    names = [name for name, _ in folded.net.blocks.named_parameters()]
    assert not [name for name in names if "gamma" in name or ".ls" in name]


@pytest.mark.parametrize(
    "model",
    ["dinov3", "rope-mixed", "beit", "relpos", "differential", "hybrid", "naflex"],
    indirect=True,
)
def test_the_file_equals_pytorch(model, tmp_path):
    report = tomexport.export(model, "const:4", tmp_path / "model.onnx")
    assert {run.name.partition(" ")[0] for run in report.verify.runs}
    assert report.verify.passed


@pytest.mark.parametrize(
    ("model", "backend"), [("dinov3", "openvino"), ("relpos", "onnxruntime")], indirect=["model"]
)
def test_places_follow_fused_kernels(model, natural_images, fused, tmp_path, backend):
    path = tmp_path / "model.onnx"
    tomexport.export(model, "const:4", path, verify=False)
    standard, other = (
        tomexport.load(path, backend, precision="f32", kernels=kernels)
        for kernels in ("off", "auto")
    )
    assert other.kernels
    image = _images(model, natural_images)[:1]
    with torch.no_grad():
        expected = tomexport.reduce(model, "const:4")(image).numpy()
    for runner in (standard, other):
        assert np.abs(runner(image.numpy()) - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("model", ["dinov3", "relpos", "beit", "naflex"], indirect=True)
@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's, of how it interpolates
def test_another_image_size(model, natural_images):
    """Positions are resampled as timm does when it is told the size."""
    reduced = tomexport.reduce(model, "none", img_size=(128, 96))
    image = torch.from_numpy(natural_images(128)[:1, :, :, :96].copy())
    other = copy.deepcopy(model)
    if hasattr(other, "set_input_size"):
        other.set_input_size(img_size=(128, 96))
    with torch.no_grad():
        expected = other(image)
        assert (reduced(image) - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert reduced.plan.steps[0].tokens_in == 8 * 6 + model.num_prefix_tokens


# --- refused


class _Strange(torch.nn.Linear):
    pass


def _changed(seeded, key, change):
    name, options = ALL[key]
    model = copy.deepcopy(seeded(name, **options))
    change(model)
    return model


def _replace(path):
    def change(model):
        owner, _, last = path.rpartition(".")
        setattr(model.get_submodule(owner), last, _Strange(1, 1))

    return change


@pytest.mark.parametrize(
    ("key", "change", "reason"),
    [
        ("rope-mixed", _replace("blocks.1"), "block 1 is a _Strange, whose order of attention"),
        (
            "beit",
            _replace("blocks.1.attn"),
            "attention of block 1 is a _Strange, whose set of keys",
        ),
        (
            "several",
            _replace("blocks.0.attns.1.attn"),
            "whose set of keys is not known; .* Attention",
        ),
        ("side-by-side", _replace("blocks.2"), "known here: ParallelScalingBlock"),
        ("relpos", _replace("patch_embed"), "patch embedding is a _Strange, not of a known class"),
        ("relpos", _replace("blocks.0.attn.rel_pos"), "only the tables of RelPosBias"),
        ("dinov3", lambda m: setattr(m, "global_pool", "max"), "pooling is 'max'"),
        ("dinov3", lambda m: setattr(m, "patch_drop", torch.nn.Dropout()), "patch_drop_rate"),
        (
            "naflex",
            lambda m: setattr(m, "rope", torch.nn.Linear(1, 1)),
            "rotary positions are made",
        ),
        ("dinov3", lambda m: setattr(m, "blocks", torch.nn.ModuleList()), "it has no blocks"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_cannot_be_right_is_refused_by_name(seeded, key, change, reason):
    with pytest.raises(RewriteError, match=reason):
        tomexport.reduce(_changed(seeded, key, change), "none")


def test_a_naflex_model_without_a_size_is_refused():
    timm()
    from timm.models.naflexvit import NaFlexVit

    with pytest.raises(RewriteError, match="images of any size, and nothing says which"):
        tomexport.reduce(NaFlexVit(depth=1, embed_dim=64, num_heads=1), "none")


@pytest.mark.parametrize("method", ["evit", "topk"])
def test_methods_that_need_more_than_keys_are_refused_where_there_is_none(seeded, method):
    name, options = ALL["several"]
    with pytest.raises(RewriteError, match="which the family 'parallel' does not give"):
        tomexport.reduce(seeded(name, **options), "keep:0.7@1", method=method)
