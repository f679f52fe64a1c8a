"""Record what Hugging Face's own models compute; `test_huggingface.py` compares with it.

    pip install transformers && python -m tests.exporter.layouts.record_huggingface

Each model is small, its weights are drawn by `weights_of`, and what is kept is its config.json, the
keys and shapes of the file that the library writes and of the module itself, and the output.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from tests.exporter.layouts.drawn import image_of, weights_of

TARGET = Path(__file__).with_name("huggingface.json")
_SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}


def _models():
    import transformers as hf

    sizes = _SIZES | {"intermediate_size": 192, "patch_size": 16, "image_size": 64}
    labels = {"num_labels": 5}
    dino = sizes | {"patch_size": 14, "image_size": 56}
    clip = sizes | {"patch_size": 32, "image_size": 128, "projection_dim": 7}
    tower = hf.CLIPConfig(vision_config=clip, **labels)
    siglip = hf.SiglipConfig(vision_config=sizes, **labels)
    yield "vit", hf.ViTForImageClassification(hf.ViTConfig(**sizes, **labels)), "logits"
    yield "vit_features", hf.ViTModel(hf.ViTConfig(**sizes)), "class"
    deit = hf.DeiTConfig(**sizes, **labels)
    yield "deit", hf.DeiTForImageClassification(deit), "logits"
    yield "deit_teacher", hf.DeiTForImageClassificationWithTeacher(deit), "logits"
    yield "dinov2", hf.Dinov2Model(hf.Dinov2Config(**dino)), "class"
    yield "dinov2_giant", hf.Dinov2Model(hf.Dinov2Config(**dino, use_swiglu_ffn=True)), "class"
    registers = hf.Dinov2WithRegistersConfig(**dino)
    yield "dinov2_registers", hf.Dinov2WithRegistersModel(registers), "class"
    yield "clip", hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**clip)), "image_embeds"
    yield "clip_features", hf.CLIPVisionModel(hf.CLIPVisionConfig(**clip)), "pooler_output"
    yield "clip_classifier", hf.CLIPForImageClassification(tower), "logits"
    vision = hf.SiglipVisionConfig(**sizes)
    yield "siglip", hf.SiglipVisionModel(vision), "pooler_output"
    yield "siglip_classifier", hf.SiglipForImageClassification(siglip), "logits"


def _record(model, output):
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        written = {key: list(tensor.shape) for key, tensor in load_file(file).items()}
        # through the library's own loading, which knows what its older names mean
        save_file(weights_of(written), file, metadata={"format": "pt"})
        loaded = type(model).from_pretrained(folder).eval()
    held = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    model.load_state_dict(weights_of(held))
    side = config.get("vision_config", config)["image_size"]
    for other in ("id2label", "label2id", "text_config"):
        config.pop(other, None)
    files = [
        {"shapes": shapes, "output": _output(each, output, side)}
        for shapes, each in ((written, loaded), (held, model.eval()))
    ]
    return {"config": config, "files": files}


def _output(model, output, side):
    with torch.no_grad():
        given = model(image_of(side))
    value = given.last_hidden_state[:, 0] if output == "class" else given[output]
    return value[0].tolist()


def main() -> None:
    """Write the recordings."""
    recorded = {name: _record(model, output) for name, model, output in _models()}
    TARGET.write_text(json.dumps(recorded, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
