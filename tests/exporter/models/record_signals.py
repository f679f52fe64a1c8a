"""Record what Hugging Face's VideoMAE and AST compute; `test_signals.py` compares with it.

pip install transformers && python -m tests.exporter.models.record_signals
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from tests.exporter.models import signals

TARGET = Path(__file__).with_name("signals.json")
_NAMES = (
    (r"(?:videomae|audio_spectrogram_transformer)\.", ""),
    (r"(?:encoder\.layer|layers)\.", "blocks."),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.cls_token", "cls_token"),
    (r"attention\.(?:output\.dense|o_proj)", "attn.proj"),
    (r"attention\.(?:attention\.)?([qkv])(?:_proj|uery|ey|alue)", r"attn.\1"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"(?<!n\.)output\.dense", "mlp.fc2"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"classifier\.layernorm", "mlp_head.0"),
    (r"classifier\.dense", "mlp_head.1"),
    (r"^classifier", "head"),
    (r"^layernorm", "norm"),
)


def _weights(model, drawn):
    """Give each weight of a model what its authors' name has."""
    split = {}
    for key, tensor in drawn.items():
        plain = key.removeprefix("v.")
        if ".qkv." in plain:
            split |= {
                plain.replace("qkv", p): t for p, t in zip("qkv", tensor.chunk(3), strict=True)
            }
        else:
            split[re.sub(r"([qv])_bias", r"\1.bias", plain)] = tensor
    state = {}
    for key in model.state_dict():
        name = key
        for pattern, other in _NAMES:
            name = re.sub(pattern, other, name)
        state[key] = split[name]
    return state


def main() -> None:
    """Write the recordings."""
    import transformers as hf

    sizes = {"num_hidden_layers": 2, "layer_norm_eps": 1e-6, "num_labels": signals.CLASSES}
    video = hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, image_size=32,
        num_frames=4, **sizes,
    ))  # fmt: skip
    audio = hf.ASTForAudioClassification(hf.ASTConfig(
        hidden_size=192, num_attention_heads=3, intermediate_size=768, num_mel_bins=36,
        max_length=66, **sizes,
    ))  # fmt: skip
    clip, spectrogram = signals.clip().reshape(1, 4, 3, 32, 32), signals.spectrogram()
    given = {"videomae": (video, signals.videomae(), clip),
             "ast": (audio, signals.ast(), spectrogram[:, 0].mT)}  # fmt: skip
    recorded = {}
    for name, (model, drawn, signal) in given.items():
        model.load_state_dict(_weights(model, drawn))
        with torch.no_grad():
            recorded[name] = model.eval()(signal).logits[0].tolist()
    TARGET.write_text(json.dumps(recorded) + "\n")


if __name__ == "__main__":
    main()
