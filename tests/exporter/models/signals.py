"""Small models of clips and spectrograms, with weights under the names that their authors use."""

from __future__ import annotations

from tests.exporter.layouts.drawn import image_of, weights_of

WIDTH, CLASSES = 192, 5
CLIP = {"n_frames": 4, "img_size": 32}
SPECTROGRAM = {"img_size": (36, 66)}  # 3 × 6 patches


def clip():
    """(1, 4 frames · 3, 32, 32), the frames one after another."""
    return image_of(32, 12)


def spectrogram():
    """(1, 1, 36 frequencies, 66 times)."""
    return image_of(36, 1, 66)


def _blocks(depth, width):
    for i in range(depth):
        at = f"blocks.{i}."
        yield from (
            (f"{at}norm{n}.{kind}", (width,)) for n in (1, 2) for kind in ("weight", "bias")
        )
        for layer, rows, columns in (("attn.proj", width, width), ("mlp.fc1", 4 * width, width),
                                     ("mlp.fc2", width, 4 * width)):  # fmt: skip
            yield f"{at}{layer}.weight", (rows, columns)
            yield f"{at}{layer}.bias", (rows,)
        yield f"{at}attn.qkv.weight", (3 * width, width)


def videomae(depth=2, width=384, classes=CLASSES):
    """Draw VideoMAE's weights, as its authors name them."""
    shapes = dict(_blocks(depth, width))
    shapes |= {f"blocks.{i}.attn.{part}_bias": (width,) for i in range(depth) for part in "qv"}
    shapes |= {"patch_embed.proj.weight": (width, 3, 2, 16, 16), "patch_embed.proj.bias": (width,),
               "fc_norm.weight": (width,), "fc_norm.bias": (width,),
               "head.weight": (classes, width), "head.bias": (classes,)}  # fmt: skip
    return weights_of(shapes)


def ast(depth=2, width=WIDTH, classes=CLASSES, n_patches=18):
    """Draw AST's weights, as its authors name them."""
    shapes = {f"v.{key}": shape for key, shape in _blocks(depth, width)}
    shapes |= {f"v.blocks.{i}.attn.qkv.bias": (3 * width,) for i in range(depth)}
    shapes |= {"v.cls_token": (1, 1, width), "v.dist_token": (1, 1, width),
               "v.pos_embed": (1, 2 + n_patches, width), "v.norm.weight": (width,),
               "v.norm.bias": (width,), "v.patch_embed.proj.weight": (width, 1, 16, 16),
               "v.patch_embed.proj.bias": (width,), "mlp_head.0.weight": (width,),
               "mlp_head.0.bias": (width,), "mlp_head.1.weight": (classes, width),
               "mlp_head.1.bias": (classes,)}  # fmt: skip
    return weights_of(shapes)
