"""State dict → model: found by shapes, computing what timm computes, or refused by name."""

from __future__ import annotations

import re
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from tomexport.errors import CheckpointError, RewriteError, TomexportError, UnknownNameError
from tomexport.exporter.architecture import Built, build
from tomexport.exporter.checkpoint import Checkpoint
from tomexport.exporter.weights import seed_weights
from tomexport.exporter.zoo import preprocessing, timm

State = dict[str, Tensor]


@lru_cache(maxsize=8)
def made(name: str, **options) -> nn.Module:
    """Return a timm model with seeded weights, without the time that its initialisation takes."""
    with torch.device("meta"):
        model = timm().create_model(name, weight_init="skip", **options)
    return seed_weights(model.to_empty(device="cpu"), 0).eval()


def shapes_of(name: str, **options) -> State:
    """Return the state dict of a timm model, without memory for its values."""
    with torch.device("meta"):
        return timm().create_model(name, **options).state_dict()


def found(state: State, arch: str | None = None, says: str | None = None) -> Built:
    return build(Checkpoint("model.pth", dict(state), says), arch)


def refusal(
    state: State,
    arch: str | None = None,
    says: str | None = None,
    error: type[TomexportError] = CheckpointError,
) -> str:
    with pytest.raises(error) as caught:
        found(state, arch, says)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_computes_the_same(model: nn.Module, original: nn.Module, image: Tensor) -> None:
    with torch.no_grad():
        output, expected = model(image), original(image)
    assert expected.std() > 0.01, "an output without contrast shows nothing"
    assert torch.equal(output, expected)


@pytest.fixture(scope="module")
def image(natural_images):
    """One photograph, (1, 3, size, size)."""
    return lru_cache(lambda size: torch.from_numpy(natural_images(size)[:1]))


@pytest.fixture
def state() -> State:
    return dict(made("test_vit").state_dict())


# ---- found by shapes


@pytest.mark.parametrize(
    ("name", "equals"),
    [
        ("deit_tiny_patch16_224", {"vit_tiny_patch16_224", "deit_tiny_patch16_224"}),
        ("vit_small_patch16_224", {"vit_small_patch16_224", "deit_small_patch16_224"}),
        ("deit_tiny_distilled_patch16_224", {"deit_tiny_distilled_patch16_224"}),
        ("test_vit", {"test_vit"}),
        ("test_vit2", {"test_vit2"}),  # a register, no class token, LayerScale, fc_norm
        ("test_vit3", {"test_vit3"}),  # attention pooling
        ("test_vit4", {"test_vit4"}),  # RMSNorm
    ],
)
def test_a_state_dict_alone_gives_the_model_that_timm_has(image, name, equals):
    original = made(name)
    built = found(original.state_dict())
    assert equals <= set(built.names)
    assert not built.model.training
    assert_computes_the_same(built.model, original, image(original.patch_embed.img_size[0]))


def test_one_line_says_which_name_fits(state):
    built = found(state)
    assert built.names == ("test_vit",)
    assert built.notes == ("architecture test_vit, found by shapes",)
    assert built.preprocessing == preprocessing("test_vit")


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_tiny_patch16_224"])
def test_names_that_compute_the_same_count_as_one(name):
    built = found(shapes_of(name))
    assert {"deit_tiny_patch16_224", "vit_tiny_patch16_224"} <= set(built.names)
    assert built.preprocessing is None  # deit's and vit's images are not normalised alike
    (note,) = built.notes
    assert all(name in note for name in built.names)
    assert "--arch" in note


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_tiny_patch16_224"])
def test_a_name_settles_which_of_them_it_is(name):
    built = found(shapes_of("deit_tiny_patch16_224"), arch=name)
    assert built.names == (name,)
    assert built.preprocessing == preprocessing(name)
    assert built.notes == ()


@pytest.mark.parametrize(("n_classes", "arch"), [(1, "test_vit"), (7, None), (21843, "test_vit")])
def test_the_number_of_classes_follows_the_head(image, n_classes, arch):
    original = made("test_vit", num_classes=n_classes)
    built = found(original.state_dict(), arch)
    assert built.names == ("test_vit",)
    assert built.model.num_classes == n_classes
    with torch.no_grad():
        output = built.model(image(160))
        assert output.shape == (1, n_classes)
        assert torch.equal(output, original(image(160)))


def test_both_heads_of_a_distilled_model_follow_the_weights(image):
    original = made("deit_tiny_distilled_patch16_224", num_classes=10)
    built = found(original.state_dict())
    assert built.names == ("deit_tiny_distilled_patch16_224",)
    assert_computes_the_same(built.model, original, image(224))


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("test_vit", False),
        ("test_vit", True),
        ("test_vit2", True),
        ("test_vit4", False),
        ("deit_tiny_distilled_patch16_224", True),
    ],
)
def test_a_backbone_without_a_head_gives_features(image, name, named):
    original = made(name, num_classes=0)
    assert not any(key.startswith("head.") for key in original.state_dict())
    built = found(original.state_dict(), arch=name if named else None)
    assert built.names == (name,)
    assert_computes_the_same(built.model, original, image(original.patch_embed.img_size[0]))


@pytest.mark.parametrize(
    ("name", "size", "named"),
    [
        ("test_vit", 96, False),
        ("test_vit", 224, True),
        ("test_vit2", 128, True),
        ("test_vit4", 192, False),
    ],
)
def test_the_image_size_follows_the_positions(image, name, size, named):
    original = made(name, img_size=size)
    built = found(original.state_dict(), arch=name if named else None)
    assert built.names == (name,)
    assert tuple(built.model.patch_embed.img_size) == (size, size)
    assert_computes_the_same(built.model, original, image(size))


def test_the_image_size_follows_positions_without_a_class_token():
    state = shapes_of("deit3_small_patch16_224", img_size=320)
    assert state["pos_embed"].shape[1] == 20 * 20
    built = found(state, "deit3_small_patch16_224")
    assert tuple(built.model.patch_embed.img_size) == (320, 320)


@pytest.mark.parametrize("n_positions", [1, 1 + 120, 101 + 1])
def test_positions_that_are_no_square_are_refused(state, n_positions):
    state["pos_embed"] = torch.zeros(1, n_positions, 64)
    assert f"pos_embed has {n_positions} positions" in refusal(state, arch="test_vit")


def test_positions_that_are_no_square_fit_no_name(state):
    refusal(state | {"pos_embed": torch.zeros(1, 121, 64)})


@pytest.mark.parametrize(
    ("name", "named"),
    [("test_vit", False), ("test_vit", True), ("vit_tiny_patch16_224", False)],
)
def test_fc_norm_in_the_place_of_norm_means_average_pooling(image, name, named):
    original = made(name, global_pool="avg")
    assert "norm.weight" not in original.state_dict()
    built = found(original.state_dict(), arch=name if named else None)
    assert name in built.names
    assert built.model.global_pool == "avg"
    assert_computes_the_same(built.model, original, image(original.patch_embed.img_size[0]))


def test_norm_in_the_place_of_fc_norm_means_the_class_token():
    state = shapes_of("vit_base_patch16_gap_224", global_pool="token", class_token=True)
    assert found(state).model.global_pool == "token"


# ---- several functions from the same shapes


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vit_base_patch32_clip", ""),
        ("vit_base_patch16_clip", "_quickgelu"),
        ("vit_large_patch14_clip", "_quickgelu"),
    ],
)
def test_names_that_compute_different_functions_are_refused_until_one_is_named(name, kind):
    state = shapes_of(f"{name}{kind}_224", num_classes=10)
    message = refusal(state)
    assert f"{name}_224" in message
    assert f"{name}_quickgelu_224" in message
    assert "--arch" in message
    built = found(state, arch=f"{name}{kind}_224")
    assert built.names == (f"{name}{kind}_224",)
    assert type(built.model.blocks[0].mlp.act).__name__ == ("QuickGELU" if kind else "GELU")


def test_the_word_of_the_file_settles_it_too():
    name = "vit_base_patch32_clip_quickgelu_224"
    built = found(shapes_of(name), says=name)
    assert built.names == (name,)
    assert type(built.model.blocks[0].mlp.act).__name__ == "QuickGELU"


def test_a_name_of_that_image_size_does_not_rule_out_another_function():
    state = shapes_of("vit_base_patch16_clip_quickgelu_224", img_size=384)
    message = refusal(state)
    assert "vit_base_patch16_clip_quickgelu_224" in message
    assert "vit_base_patch16_clip_384" in message


def test_a_name_of_that_image_size_does_not_settle_the_preprocessing():
    built = found(shapes_of("deit_tiny_patch16_224", img_size=384))
    assert {"deit_tiny_patch16_224", "vit_tiny_patch16_384"} <= set(built.names)
    assert built.preprocessing is None


# ---- keys


MISSING = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
           "blocks.0.norm1.weight", "blocks.3.attn.qkv.bias", "blocks.5.mlp.fc2.weight",
           "norm.bias", "head.weight", "head.bias"]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "arch"),
    [(key, "test_vit") for key in MISSING] + [(key, None) for key in MISSING[::3]],
)
def test_a_missing_key_is_named(state, key, arch):
    del state[key]
    message = refusal(state, arch)
    assert re.search(rf"(?<![\w.]){re.escape(key)}(?!\.?\w)", message)
    assert "model.pth" in message


@pytest.mark.parametrize(
    ("key", "arch"),
    [
        ("extra.weight", None),
        ("extra.weight", "test_vit"),
        ("head_dist.weight", "test_vit"),
        ("blocks.0.ls1.gamma", None),
        ("cls", "test_vit"),
    ],
)
def test_an_unexpected_key_is_named(state, key, arch):
    message = refusal(state | {key: torch.zeros(64)}, arch)
    assert f"1 key unexpected: {key}." in message
    assert "test_vit" in message


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        ("blocks.1.mlp.fc1.bias", (100,), "blocks.1.mlp.fc1.bias is 100, expected 192"),
        ("norm.weight", (), "norm.weight is a scalar, expected 64"),
        ("pos_embed", (101, 64), "pos_embed is 101×64, expected 1×101×64"),
        ("head.bias", (10,), "head.bias is 10, expected 1000"),
        ("cls_token", (1, 2, 64), "cls_token is 1×2×64, expected 1×1×64"),
    ],
)
def test_a_key_of_another_shape_is_named_with_both_shapes(state, key, shape, words):
    message = refusal(state | {key: torch.zeros(shape)}, "test_vit")
    assert f"1 key of another shape: {words}" in message


@pytest.mark.parametrize("arch", [None, "test_vit"])
def test_missing_unexpected_and_reshaped_keys_are_told_together(state, arch):
    del state["norm.weight"], state["norm.bias"]
    state |= {"extra": torch.zeros(2), "cls_token": torch.zeros(1, 1, 32)}
    message = refusal(state, arch)
    assert "2 keys missing: norm.weight, norm.bias;" in message
    assert "1 key unexpected: extra;" in message
    assert "1 key of another shape: cls_token is 1×1×32, expected 1×1×64" in message


def test_of_many_keys_the_first_are_named_and_the_rest_counted(state):
    fewer = {key: tensor for key, tensor in state.items() if not key.startswith("blocks.5.")}
    n_missing = len(state) - len(fewer)
    message = refusal(fewer)
    assert f"{n_missing} keys missing: blocks.5.norm1.weight, " in message
    assert f" and {n_missing - 6} more" in message


def test_a_size_without_a_name_is_described():
    message = refusal(made("test_vit", depth=4).state_dict())
    assert "width 64, 4 blocks, patches of 16×16×3) fits no supported timm name" in message
    assert "The nearest is test_vit" in message
    assert "tomexport.export(model" in message


SPARE = {
    "mask_token": "pre-training",
    "decoder_pos_embed": "decoder",
    "decoder_blocks.0.attn.qkv.weight": "decoder",
    "decoder.blocks.0.norm1.weight": "decoder",
    "total_ops": "FLOP",
    "blocks.0.attn.total_params": "FLOP",
    "n_averaged": "averaged",
    "blocks.3.attn.out_zero_mask": "ATS",
}


@pytest.mark.parametrize("key", SPARE)
def test_a_spare_key_is_left_out_and_listed(image, state, key):
    built = found(state | {key: torch.ones(1)}, "test_vit")
    listed = [note for note in built.notes if note.startswith("left out: ")]
    assert len(listed) == 1
    assert key in listed[0]
    assert SPARE[key] in listed[0]
    assert_computes_the_same(built.model, made("test_vit"), image(160))


def test_all_spare_keys_are_listed_in_one_line(state):
    built = found(state | {key: torch.ones(1) for key in SPARE})
    assert built.names == ("test_vit",)
    (line,) = [note for note in built.notes if note.startswith("left out: ")]
    assert "\n" not in line
    assert "decoder_pos_embed and 2 more (" in line
    assert all(reason in line for reason in SPARE.values())


@pytest.mark.parametrize(
    "key",
    ["my_mask_token", "blocks.0.mask_token", "blocks.0.decoder.weight", "score_predictor",
     "total_ops_2", "blocks.x.attn.out_zero_mask", "head.n_averaged"],
)  # fmt: skip
def test_a_key_that_only_resembles_a_spare_one_is_refused(state, key):
    assert f"1 key unexpected: {key}." in refusal(state | {key: torch.ones(1)}, "test_vit")


def test_the_checkpoint_keeps_its_keys(state):
    checkpoint = Checkpoint("model.pth", state | {"mask_token": torch.ones(1)}, None)
    keys = list(checkpoint.state)
    build(checkpoint, "test_vit")
    assert list(checkpoint.state) == keys


# ---- named by the user or by the file


def test_a_file_that_names_itself_is_taken_at_its_word(state):
    built = found(state, says="test_vit")
    assert built.names == ("test_vit",)
    assert built.notes == ("architecture test_vit, as the file says",)
    assert built.preprocessing == preprocessing("test_vit")


def test_a_file_that_names_itself_leaves_no_doubt_about_its_preprocessing():
    name = "deit_tiny_patch16_224"
    built = found(shapes_of(name), says=name)
    assert built.names == (name,)
    assert built.preprocessing == preprocessing(name)


@pytest.mark.parametrize("tag", ["augreg_in21k", "augreg_in21k_ft_in1k"])
def test_a_name_with_its_tag_brings_that_tags_preprocessing(tag):
    name = f"vit_tiny_patch16_224.{tag}"
    built = found(shapes_of("vit_tiny_patch16_224"), arch=name)
    assert built.names == (name,)
    assert built.preprocessing == preprocessing(name)


@pytest.mark.parametrize("word", ["my_vit", "resnet50", "test_vit.r161_in1k"])
def test_a_file_that_names_itself_otherwise_is_found_by_shapes(state, word):
    built = found(state, says=word)
    assert built.names == ("test_vit",)
    first, second = built.notes
    assert repr(word) in first
    assert second == "architecture test_vit, found by shapes"


def test_a_file_that_does_not_fit_its_own_name_is_refused(state):
    message = refusal(state, says="test_vit2")
    assert "does not fit test_vit2" in message
    assert "reg_token" in message
    assert "cls_token" in message


def test_the_user_overrules_the_file(state):
    built = found(state, arch="test_vit", says="test_vit2")
    assert built.names == ("test_vit",)


def test_weights_of_another_architecture_than_named_are_refused(state):
    message = refusal(state, arch="test_vit2")
    assert "model.pth does not fit test_vit2" in message
    assert "reg_token" in message


@pytest.mark.parametrize(
    ("arch", "meant"),
    [("test_vitt", "test_vit"), ("deit_tinny_patch16_224", "deit_tiny_patch16_224")],
)
def test_a_misspelt_architecture_is_refused_with_the_nearest(state, arch, meant):
    assert f"Did you mean '{meant}'?" in refusal(state, arch, error=UnknownNameError)


def test_an_unknown_tag_is_refused_with_the_known_ones(state):
    message = refusal(state, "test_vit.r161_in1k", error=UnknownNameError)
    assert "'r161_in1k'" in message
    assert "Did you mean 'r160_in1k'?" in message


@pytest.mark.parametrize("arch", ["resnet50", "swin_tiny_patch4_window7_224"])
def test_an_architecture_of_another_kind_is_refused_by_name(state, arch):
    assert arch in refusal(state, arch, error=RewriteError)


# ---- weights of something else


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "convnext_atto",
        "mixer_s32_224",
        "swin_tiny_patch4_window7_224",
        "cait_xxs24_224",
        "vit_small_patch16_rope_ape_224",
        "xcit_nano_12_p16_224",
    ],
)
def test_the_weights_of_another_model_are_refused(name):
    assert "model.pth" in refusal(shapes_of(name))


def test_a_state_dict_that_has_only_a_patch_embedding_is_refused(state):
    key = "patch_embed.proj.weight"
    assert "known layout" in refusal({key: state[key]})


@pytest.mark.parametrize("arch", [None, "test_vit"])
@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("patch_embed.proj.weight", (64,)),
        ("patch_embed.proj.weight", ()),
        ("patch_embed.proj.weight", (64, 768)),
        ("head.weight", ()),
        ("head.weight", (0, 64)),
        ("pos_embed", ()),
        ("pos_embed", (1, 0, 64)),
    ],
)
def test_a_shape_that_no_model_has_is_refused(state, key, shape, arch):
    refusal(state | {key: torch.zeros(shape)}, arch)


@pytest.mark.parametrize(
    ("kind", "arch"),
    [(torch.int64, None), (torch.int64, "test_vit"), (torch.bool, "test_vit")],
)
def test_integer_weights_are_refused_by_name(state, kind, arch):
    key = "blocks.2.attn.proj.weight"
    assert key in refusal(state | {key: state[key].to(kind)}, arch)
