"""The reduced module against ToMe written by hand, and against the original at r = 0."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tomexport
from tests.exporter import tome_by_hand
from tomexport.errors import PlanError, RewriteError
from tomexport.exporter.methods.tome import TOME
from tomexport.exporter.rewrite import ReducedModel
from tomexport.exporter.zoo import timm

SCHEDULES = ["const:8", "const:16", "linear:13", "exp:0.25,0", "exp:0.1,0.6", "list:5,0,9,3"]
MODELS = ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch16_224"]
# two implementations in float32, 12 blocks: measured 2e-6 of the largest output
TOLERANCE = 1e-5


def _compare(model, schedule, image, tokens=False, **options):
    kind = "tokens" if tokens else None
    reduced = tomexport.reduce(model, schedule, output_kind=kind, **options)
    removals = [step.requested for step in reduced.plan.steps]
    with torch.no_grad():
        expected = tome_by_hand.forward(model, image, removals, tokens=tokens, **options)
        found = reduced(image)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_tome_by_hand(seeded, natural_images, name, schedule):
    image = torch.from_numpy(natural_images(224)[:1])
    found = _compare(seeded(name), schedule, image)
    with torch.no_grad():
        assert (found - seeded(name)(image)).abs().max() > 1e-3, "merging changed nothing"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit3_small_patch16_224", {"depth": 3}),  # LayerScale, positions without prefix
        ("vit_small_patch14_reg4_dinov2", {"depth": 3, "img_size": 224, "num_classes": 5}),
        ("vit_base_patch16_clip_224", {"depth": 2}),  # norm before the blocks
        ("vit_tiny_patch16_224", {"depth": 3, "qk_norm": True}),
        ("vit_tiny_patch16_224", {"depth": 3, "global_pool": "avg"}),  # MAE's pooling
        ("vit_tiny_patch16_224", {"depth": 3, "global_pool": "avg", "class_token": False}),
        ("vit_tiny_patch16_224", {"depth": 3, "num_classes": 0}),  # features
        ("vit_tiny_patch16_224", {"depth": 3, "scale_attn_norm": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_parts_of_the_family_equal_tome_by_hand(seeded, natural_images, name, options):
    image = torch.from_numpy(natural_images(224)[1:2])
    _compare(seeded(name, **options), "const:16", image)


def test_without_proportional_attention(seeded, natural_images):
    image = torch.from_numpy(natural_images(224)[:1])
    model = seeded("vit_tiny_patch16_224", depth=3)
    without = _compare(model, "const:16", image, prop_attn=False)
    assert (without - _compare(model, "const:16", image)).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "test_vit3"])
def test_nothing_removed_is_the_original(seeded, natural_images, name):
    model = seeded(name)
    image = torch.from_numpy(natural_images(model.patch_embed.img_size[0]))
    with torch.no_grad():
        expected = model(image)
        for schedule in ("none", "const:0", "exp:0,0.5"):
            found = tomexport.reduce(model, schedule)(image)
            assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_attention_pooling_weighs_by_size(seeded):
    """A token that stands for two equal patches must count like the two of them."""
    model = seeded("test_vit3")
    reduced = tomexport.reduce(model, "const:1")
    family, net = reduced._family, reduced.net
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, model.embed_dim, generator=generator)
    doubled = torch.cat([x, x[:, -1:]], dim=1)
    size = torch.tensor([1.0, 1, 1, 1, 1, 2])[None, :, None]
    with torch.no_grad():
        torch.testing.assert_close(
            family.head(net, x, size), family.head(net, doubled, None), rtol=1e-5, atol=1e-5
        )


def test_trace_gives_the_targets_of_every_reduction(seeded, natural_images):
    model = seeded("test_vit")
    image = torch.from_numpy(natural_images(160))
    reduced = tomexport.reduce(model, "list:5,0,9")
    with torch.no_grad():
        output, decisions = reduced.trace(image)
        assert torch.equal(output, reduced(image))
    assert [d.target.shape for d in decisions] == [(4, 101), (4, 96)]
    for decision, left in zip(decisions, (96, 87), strict=True):
        assert decision.target.unique().tolist() == list(range(left))
        assert (decision.margin >= 0).all()


def test_the_model_passed_in_stays_as_it_was(natural_images):
    model = timm().create_model("test_vit3", drop_path_rate=0.5)
    model.train()
    before = copy.deepcopy(model.state_dict())
    fused = model.attn_pool.fused_attn
    reduced = tomexport.reduce(model, "const:4")
    with torch.no_grad():
        image = torch.from_numpy(natural_images(160))
        assert torch.equal(reduced(image), reduced(image)), "dropout is off in the reduced module"
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.attn_pool.fused_attn == fused
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_weights_are_shared(seeded):
    model = seeded("test_vit")
    assert tomexport.reduce(model, "const:4").net.head.weight is model.head.weight


def test_blocks_that_repeat_are_called_as_often_as_listed(natural_images, seeded):
    model = copy.deepcopy(seeded("test_vit"))
    model.blocks = nn.Sequential(*[model.blocks[i // 2] for i in range(6)])
    image = torch.from_numpy(natural_images(160)[:1])
    reduced = _compare(model, "const:8", image)
    assert reduced.shape == (1, 1000)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("test_vit", {"global_pool": "avgmax"}, "avgmax"),
        ("test_vit", {"global_pool": ""}, "pooling is ''"),
        ("test_vit", {"patch_drop_rate": 0.5}, "patch_drop_rate"),
        ("resnet18", {}, "ResNet"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_right_is_refused_by_name(name, options, reason):
    model = timm().create_model(name, **options)
    with pytest.raises(RewriteError, match=reason):
        tomexport.reduce(model, "none")


def test_hooks_are_refused(seeded):
    model = copy.deepcopy(seeded("test_vit"))
    model.blocks[2].attn.register_forward_hook(lambda *args: None)
    with pytest.raises(RewriteError, match=r"block 2 has a forward hook on attn"):
        tomexport.reduce(model, "none")


def test_half_precision_is_refused():
    model = timm().create_model("test_vit").bfloat16()
    with pytest.raises(RewriteError, match=r"torch\.bfloat16.*model\.float\(\)"):
        tomexport.reduce(model, "none")


def test_a_plan_of_another_model_is_refused(seeded):
    plan = tomexport.plan(seeded("test_vit2"), "const:4")
    with pytest.raises(PlanError, match="8 steps, the model 6 block calls"):
        ReducedModel(seeded("test_vit"), plan, TOME)


@pytest.mark.parametrize(
    ("name", "n_read"),
    [("deit_tiny_patch16_224", 1), ("deit_tiny_distilled_patch16_224", 2)],
)
def test_what_the_head_does_not_read_is_spared(seeded, name, n_read):
    """DeiT-Tiny's last block: 196 tokens without query, projection and MLP; 197 keys and values."""
    plan = tomexport.plan(name, "none")
    n = plan.steps[-1].tokens_in
    width = 192
    assert plan.macs_spared == (n - n_read) * (2 * width**2 + 2 * width * n + 8 * width**2)
    assert tomexport.plan("vit_base_patch16_siglip_224", "none").macs_spared == 0


def test_folded_weights_compute_the_same_and_leave_the_model_alone(seeded, natural_images):
    model = seeded("deit3_small_patch16_224", depth=3)  # LayerScale
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    image = torch.from_numpy(natural_images(224)[:1])
    reduced = tomexport.reduce(model, "const:16")
    folded = reduced.folded()
    with torch.no_grad():
        expected = reduced(image)
        assert (folded(image) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert folded.net.blocks[0].attn.scale == 1
    assert isinstance(folded.net.blocks[0].ls1, nn.Identity)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("what", ["blocks", "MLPs"])
def test_what_blocks_share_is_folded_once(seeded, natural_images, what):
    model = copy.deepcopy(seeded("test_vit", depth=4, init_values=1.0))  # LayerScale
    first, second, third, _ = model.blocks
    if what == "blocks":
        model.blocks = nn.Sequential(first, second, first, second)
    else:  # one MLP, whose result each block scales in its own way
        third.mlp = first.mlp
    image = torch.from_numpy(natural_images(160)[:1])
    reduced = tomexport.reduce(model, "const:8")
    folded = reduced.folded()
    with torch.no_grad():
        assert torch.allclose(tomexport.reduce(model, "none")(image), model(image), atol=1e-5)
        expected = reduced(image)
        assert (folded(image) - expected).abs().max() <= 1e-5 * expected.abs().max()
    count = [sum(p.numel() for p in each.net.parameters()) for each in (reduced, folded)]
    gammas = sum(p.numel() for n, p in reduced.net.named_parameters() if n.endswith("gamma"))
    shared = 2 * model.embed_dim if what == "MLPs" else 0
    assert count[1] == count[0] - gammas + shared


# ---- tokens: a feature of each patch


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_distilled_patch16_224", {"depth": 3}),
        ("vit_small_patch14_reg4_dinov2", {"depth": 2, "img_size": 224}),
        ("vit_tiny_patch16_224", {"depth": 2, "global_pool": "avg"}),  # no norm before pooling
        ("test_vit3", {}),  # pools by attention
        ("lvvit_s", {"depth": 2}),
        ("sret_t", {}),  # those of the last stage
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_tokens_of_nothing_removed_are_timms_own(seeded, natural_images, name, options):
    model = seeded(name, **options)
    reduced = tomexport.reduce(model, "none", output_kind="tokens")
    image = torch.from_numpy(natural_images(reduced.input_shape[1])[:1])
    with torch.no_grad():
        found = reduced(image)
        expected = model.forward_features(image)[:, reduced.plan.n_prefix :]
    assert reduced.output == "tokens"
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_distilled_patch16_224", {"depth": 3}),
        ("vit_tiny_patch16_224", {"depth": 3, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"depth": 3, "class_token": False, "global_pool": "avg"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_every_patch_has_the_feature_of_the_token_it_ended_in(
    seeded, natural_images, name, options
):
    image = torch.from_numpy(natural_images(224)[:1])
    found = _compare(seeded(name, **options), "const:40", image, tokens=True)
    assert found.shape == (1, 196, 192)
    assert len(found[0].unique(dim=0)) == 196 - 40 * options["depth"]


def test_tokens_average_to_what_is_pooled(seeded, natural_images):
    model = seeded("sret_t")
    image = torch.from_numpy(natural_images(224)[:2])
    with torch.no_grad():
        logits = tomexport.reduce(model, "const:10")(image)
        tokens = tomexport.reduce(model, "const:10", output_kind="tokens")(image)
        found = model.classify(tokens.mean(dim=1))
    assert (found - logits).abs().max() <= TOLERANCE * logits.abs().max()
    assert len(tokens[0].unique(dim=0)) < tokens.shape[1] == 49


@pytest.mark.parametrize("method", ["evo-vit", "etps", "evit", "tofu", "pitome", "bound"])
def test_methods_that_drop_nothing_give_each_patch_a_feature(seeded, natural_images, method):
    model = seeded("vit_tiny_patch16_224", depth=3)
    reduced = tomexport.reduce(model, "keep:0.7@1,2", method=method, output_kind="tokens")
    with torch.no_grad():
        tokens = reduced(torch.from_numpy(natural_images(224)[:1]))
    n_left = len(tokens[0].unique(dim=0))
    assert tokens.shape == (1, 196, 192)
    assert n_left == 196 if method == "evo-vit" else n_left <= reduced.plan.steps[-1].tokens_out


@pytest.mark.parametrize(
    ("method", "schedule"),
    [
        ("topk", "const:8"),
        ("evit:fuse=no", "const:8"),
        ("diffrate", "diffrate:190,180,170/190,170,160"),
    ],
)
def test_dropped_patches_have_no_feature(seeded, method, schedule):
    model = seeded("vit_tiny_patch16_224", depth=3)
    with pytest.raises(RewriteError, match="have no feature left to put out"):
        tomexport.reduce(model, schedule, method=method, output_kind="tokens")
    tomexport.reduce(model, "none", method=method, output_kind="tokens")


def test_the_last_block_is_computed_for_all_tokens(seeded):
    model = seeded("vit_tiny_patch16_224", depth=3)
    plan = tomexport.plan(model, "const:8", output_kind="tokens")
    whole = tomexport.plan(model, "const:8")
    assert (plan.macs_spared, plan.n_reductions) == (0, 3)
    assert whole.macs - plan.macs == model.head.weight.numel()
    assert whole.n_reductions == 2
