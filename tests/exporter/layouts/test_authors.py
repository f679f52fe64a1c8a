"""Files of torchvision, SWAG, AugReg and DeiT III give what their own code computes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.exporter.layouts.drawn import image_of, weights_of
from tomexport.errors import CheckpointError
from tomexport.exporter import architecture, zoo
from tomexport.exporter.checkpoint import Checkpoint, load_checkpoint
from tomexport.exporter.layouts import timm as timm_layout

NAME = "vit_base_patch16_224"
WIDTH, HEADS, DEPTH, SIDE, CLASSES = 128, 2, 2, 64, 5


@pytest.fixture
def small(monkeypatch):
    def build(name, **options):
        sizes = {"embed_dim": WIDTH, "num_heads": HEADS, "depth": DEPTH}
        return zoo.skeleton(name, **(sizes | options))

    monkeypatch.setattr(architecture, "skeleton", build)
    monkeypatch.setattr(timm_layout, "skeleton", build)


def _built(state, arch=NAME, source="model.pth"):
    return architecture.build(Checkpoint(source, state, None), arch)


def _assert_equal(built, expected):
    with torch.no_grad():
        found = built.model(image_of(SIDE))
    assert expected.std() > 0.1
    assert float((found - expected).abs().max()) < 1e-5


# ---- torchvision and SWAG


@pytest.fixture(scope="module")
def torchvision_model():
    zoo.timm()  # which makes torchvision importable beside a CPU build of torch
    from torchvision.models import VisionTransformer

    model = VisionTransformer(SIDE, 16, DEPTH, HEADS, WIDTH, 4 * WIDTH, num_classes=CLASSES)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    model.load_state_dict(weights_of(shapes))
    with torch.no_grad():
        return model.eval().state_dict(), model(image_of(SIDE))


def _as_swag(key):
    for ours, theirs in ((r"encoder_layer_", "layer_"), (r"mlp\.0\.", "mlp.linear_1."),
                         (r"mlp\.3\.", "mlp.linear_2."), (r"heads\.", "head.layers.")):  # fmt: skip
        key = re.sub(ours, theirs, key)
    return key


def test_torchvisions_files(small, torchvision_model):
    state, expected = torchvision_model
    _assert_equal(_built(dict(state)), expected)


def test_swags_files(small, torchvision_model, tmp_path):
    state, expected = torchvision_model
    swag = {_as_swag(key): tensor for key, tensor in state.items()}
    swag["encoder.pos_embedding"] = swag["encoder.pos_embedding"].transpose(0, 1)
    torch.save(swag, tmp_path / "vit_b16_in1k.torch")
    built = architecture.build(load_checkpoint(tmp_path / "vit_b16_in1k.torch"))
    assert NAME in built.names
    _assert_equal(built, expected)


# ---- AugReg


def _flax(prefix=""):
    inner = "Transformer/encoderblock_{}/"
    attention, mlp = inner + "MultiHeadDotProductAttention_1/", inner + "MlpBlock_3/"
    per_head = WIDTH // HEADS
    shapes = {"cls": (1, 1, WIDTH), "embedding/kernel": (16, 16, 3, WIDTH),
              "embedding/bias": (WIDTH,), "head/kernel": (WIDTH, CLASSES), "head/bias": (CLASSES,),
              "Transformer/posembed_input/pos_embedding": (1, 17, WIDTH)}  # fmt: skip
    for i in range(DEPTH):
        for part in ("query", "key", "value"):
            shapes[f"{attention.format(i)}{part}/kernel"] = (WIDTH, HEADS, per_head)
            shapes[f"{attention.format(i)}{part}/bias"] = (HEADS, per_head)
        shapes[f"{attention.format(i)}out/kernel"] = (HEADS, per_head, WIDTH)
        shapes[f"{attention.format(i)}out/bias"] = (WIDTH,)
        for layer, sizes in (("Dense_0", (WIDTH, 4 * WIDTH)), ("Dense_1", (4 * WIDTH, WIDTH))):
            shapes[f"{mlp.format(i)}{layer}/kernel"] = sizes
            shapes[f"{mlp.format(i)}{layer}/bias"] = sizes[1:]
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{inner.format(i)}{norm}/{kind}": (WIDTH,) for kind in ("scale", "bias")}
    shapes |= {f"Transformer/encoder_norm/{kind}": (WIDTH,) for kind in ("scale", "bias")}
    return {prefix + key: tensor * (0.3 if tensor.ndim > 2 else 1)
            for key, tensor in weights_of(shapes).items()}  # fmt: skip


def _flax_forward(w, image):
    """Compute the network as its authors' code does, on Flax's own layouts."""
    patches = image.unfold(2, 16, 16).unfold(3, 16, 16)  # (1, 3, rows, columns, 16, 16)
    x = torch.einsum("bcijhw,hwcd->bijd", patches, w["embedding/kernel"]) + w["embedding/bias"]
    x = torch.cat([w["cls"], x.flatten(1, 2)], dim=1)
    x = x + w["Transformer/posembed_input/pos_embedding"]

    def norm(x, name):
        return functional.layer_norm(x, (WIDTH,), w[f"{name}/scale"], w[f"{name}/bias"], eps=1e-6)

    for i in range(DEPTH):
        at = f"Transformer/encoderblock_{i}/"
        inner = f"{at}MultiHeadDotProductAttention_1/"
        h = norm(x, f"{at}LayerNorm_0")
        q, k, v = (
            torch.einsum("bnc,chd->bhnd", h, w[f"{inner}{part}/kernel"])
            + w[f"{inner}{part}/bias"][:, None]
            for part in ("query", "key", "value")
        )
        mixed = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v
        out = torch.einsum("bhnd,hdc->bnc", mixed, w[f"{inner}out/kernel"])
        x = x + out + w[f"{inner}out/bias"]
        h = norm(x, f"{at}LayerNorm_2")
        inner = f"{at}MlpBlock_3/"
        h = h @ w[f"{inner}Dense_0/kernel"] + w[f"{inner}Dense_0/bias"]
        h = functional.gelu(h, approximate="tanh")
        x = x + h @ w[f"{inner}Dense_1/kernel"] + w[f"{inner}Dense_1/bias"]
    x = norm(x, "Transformer/encoder_norm")
    return x[:, 0] @ w["head/kernel"] + w["head/bias"]


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_augregs_files(small, tmp_path, prefix):
    weights = _flax(prefix)
    more = {"opt/state/step": np.zeros(1)} if prefix else {}
    np.savez(tmp_path / "S_16.npz", **{key: t.numpy() for key, t in weights.items()}, **more)
    built = architecture.build(load_checkpoint(tmp_path / "S_16.npz"), NAME)
    plain = {key.removeprefix(prefix): tensor for key, tensor in weights.items()}
    _assert_equal(built, _flax_forward(plain, image_of(SIDE)))


def test_augregs_heads_of_another_size_are_refused(small):
    weights = _flax()
    key = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
    weights[key] = weights[key].reshape(WIDTH, 2 * HEADS, -1)
    with pytest.raises(CheckpointError, match="has heads of 32 channels at a width of 128"):
        _built(weights)


def test_augregs_attention_without_values_is_refused(small):
    weights = _flax()
    del weights["Transformer/encoderblock_1/MultiHeadDotProductAttention_1/value/bias"]
    with pytest.raises(CheckpointError, match=r"have no blocks\.1\.attn\.2\.bias beside"):
        _built(weights)


@pytest.mark.parametrize("content", [b"", b"PK no archive", b"\x93NUMPY\x01\x00"])
def test_what_is_no_npz_is_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content or b"x")
    with pytest.raises(CheckpointError, match=r"not a readable \.npz of plain numbers"):
        load_checkpoint(tmp_path / "a.npz")


def test_an_npz_that_would_run_code_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", weights=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CheckpointError, match="of plain numbers"):
        load_checkpoint(tmp_path / "a.npz")


# ---- DeiT III


def test_deit3s_own_files(small):
    name = "deit3_small_patch16_224"
    options = {"embed_dim": WIDTH, "num_heads": HEADS, "depth": DEPTH, "img_size": SIDE}
    model = zoo.timm().create_model(name, **options).eval()
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    model.load_state_dict(weights_of(shapes))
    state = {re.sub(r"ls([12])\.gamma", r"gamma_\1", k): t for k, t in model.state_dict().items()}
    assert "blocks.1.gamma_2" in state
    with pytest.raises(CheckpointError, match="do not tell DeiT III from its relatives"):
        _built(state, None)
    with torch.no_grad():
        _assert_equal(_built(state, name), model(image_of(SIDE)))
