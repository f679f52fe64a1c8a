"""Loading a checkpoint: each usual wrapping is read, nothing in it runs, the rest is refused."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
from collections import OrderedDict, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tomexport.errors import CheckpointError
from tomexport.exporter.checkpoint import load_checkpoint, looks_like_file

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
WRAPPERS = ("model", "state_dict", "module", "model_state_dict", "net", "ema", "model_ema",
            "state_dict_ema")  # fmt: skip
NUMPY_KINDS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


def weights(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "cls_token": torch.randn(1, 1, 4, generator=draw),
        "patch_embed.proj.weight": torch.randn(4, 3, 2, 2, generator=draw),
        "blocks.0.attn.qkv.bias": torch.randn(12, generator=draw),
    }


def write(path: Path, content: Any, **options: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path, **options)
    else:
        torch.save(content, path, **options)
    return path


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def assert_holds(path: Path, expected: dict[str, Tensor]) -> None:
    state = load_checkpoint(path).state
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], tensor), name


def refusal(path: Path) -> str:
    """Return the message of a refusal, which is one line and names the file."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


# ---- what is read


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".PTH"])
def test_a_raw_state_dict_is_read_as_it_is(tmp_path, suffix):
    path = write(tmp_path / f"deit{suffix}", weights())
    state = load_checkpoint(path).state
    assert state.keys() == weights().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights().items())
    found = load_checkpoint(path)
    assert (found.source, found.architecture, found.notes) == (path.name, None, ())


def test_a_file_in_the_format_before_zip_is_read(tmp_path):
    path = write(tmp_path / "old.pth", weights(), _use_new_zipfile_serialization=False)
    assert_holds(path, weights())


def test_an_ordered_dict_of_parameters_is_read(tmp_path):
    parameters = OrderedDict((name, nn.Parameter(value)) for name, value in weights().items())
    assert_holds(write(tmp_path / "model.pth", parameters), weights())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_is_taken_off(tmp_path, wrapper):
    path = write(tmp_path / "model.pth", {"epoch": 3, wrapper: weights()})
    assert_holds(path, weights())
    assert load_checkpoint(path).notes == ()


@pytest.mark.parametrize(
    ("outer", "inner"),
    [("model", "state_dict"), ("model_ema", "module"), ("state_dict", "model"), ("net", "net")],
)
def test_a_wrapper_inside_a_wrapper_is_taken_off(tmp_path, outer, inner):
    path = write(tmp_path / "model.pth", {outer: {inner: weights(), "decay": 0.99}})
    assert_holds(path, weights())


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "module.model."],
)
@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_prefixes_of_module_wrappers_are_taken_off(tmp_path, prefix, wrapper):
    content: Any = {f"{prefix}{name}": tensor for name, tensor in weights().items()}
    content = {wrapper: content} if wrapper else content
    assert_holds(write(tmp_path / "model.pth", content), weights())


def test_prefixes_are_taken_off_safetensors_too(tmp_path):
    content = {f"_orig_mod.{name}": tensor for name, tensor in weights().items()}
    path = write(tmp_path / "model.safetensors", content)
    assert load_checkpoint(path).state.keys() == weights().keys()


def test_a_prefix_that_only_some_keys_have_is_part_of_their_names(tmp_path):
    content = {"module.weight": torch.ones(2), "weight": torch.zeros(2)}
    assert_holds(write(tmp_path / "model.pth", content), content)


def test_the_module_of_torchs_averaged_model_is_found_beside_its_count(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(3, 2))
    state = load_checkpoint(write(tmp_path / "swa.pth", averaged.state_dict())).state
    assert set(state) == {"n_averaged", "weight", "bias"}
    assert torch.equal(state["weight"], averaged.module.weight)


def test_a_training_file_gives_its_weights(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "epoch": 299,
        "max_accuracy": np.float64(72.2),
        "seen": np.int64(1281167),
        "losses": np.linspace(7, 2, 5),
        "rng": torch.get_rng_state(),
        "args": argparse.Namespace(lr=5e-4, model="deit_tiny_patch16_224", betas=(0.9, 0.999)),
    }
    path = write(tmp_path / "checkpoint.pth", content)
    assert_holds(path, {name: tensor.detach() for name, tensor in model.state_dict().items()})
    assert load_checkpoint(path).architecture == "deit_tiny_patch16_224"


@pytest.mark.parametrize("kind", NUMPY_KINDS)
def test_numpy_scalars_and_arrays_beside_the_weights_are_read(tmp_path, kind):
    array = np.ones(3, kind)
    path = write(tmp_path / "model.pth", {"model": weights(), "best": array[0], "curve": array})
    assert_holds(path, weights())


def test_the_state_of_numpys_random_numbers_beside_the_weights_is_read(tmp_path):
    random_state = np.random.RandomState(0).get_state()
    path = write(tmp_path / "model.pth", {"model": weights(), "numpy_rng": random_state})
    assert_holds(path, weights())


def test_numpy_scalars_of_numpy_1_are_read(tmp_path):
    content = {"model": weights(), "best": np.float64(0.5), "curve": np.ones(2)}
    data = saved(content, _use_new_zipfile_serialization=False)
    assert b"numpy._core.multiarray" in data
    path = tmp_path / "model.pth"
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert_holds(path, weights())


def test_of_several_wrappers_one_is_read_and_a_note_names_the_others(tmp_path):
    content = {"model_ema": weights(1), "state_dict_ema": weights(2), "model": weights(3)}
    path = write(tmp_path / "model.pth", content)
    assert_holds(path, weights(3))
    (note,) = load_checkpoint(path).notes
    assert note == (
        "the weights are those under 'model'; the file also has model_ema, state_dict_ema"
    )


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_other_precisions_become_float32(tmp_path, suffix, kind):
    content = {name: tensor.to(kind) for name, tensor in weights().items()}
    state = load_checkpoint(write(tmp_path / f"half{suffix}", content)).state
    for name, tensor in content.items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], tensor.float())


def test_integer_tensors_stay_integers(tmp_path):
    content = weights() | {"steps": torch.tensor([2**40])}
    assert load_checkpoint(write(tmp_path / "model.pth", content)).state["steps"].item() == 2**40


def test_loading_allows_nothing_to_those_who_load_after_it(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    load_checkpoint(write(tmp_path / "model.pth", {"model": weights(), "best": np.float64(1)}))
    assert set(torch.serialization.get_safe_globals()) == before


# ---- what the file says of its architecture


@pytest.mark.parametrize(
    "words",
    [
        {"arch": "vit_a"},
        {"architecture": "vit_a"},
        {"args": argparse.Namespace(model="vit_a", lr=0.1)},
        {"args": argparse.Namespace(arch="vit_a")},
        {"args": {"model": "vit_a"}},
        {"arch": "vit_a", "args": argparse.Namespace(model="vit_b")},
        {"arch": None, "args": {"model": "vit_a"}},
        {"arch": "", "args": {"model": "vit_a"}},
        {"arch": 7, "args": {"model": "vit_a"}},
    ],
    ids=repr,
)
def test_a_training_file_names_its_architecture(tmp_path, words):
    path = write(tmp_path / "model.pth", {"state_dict": weights(), **words})
    assert load_checkpoint(path).architecture == "vit_a"


@pytest.mark.parametrize(
    "words",
    [{}, {"args": argparse.Namespace(lr=0.1)}, {"args": None}, {"args": ["vit_a"]}],
    ids=repr,
)
def test_a_training_file_may_leave_its_architecture_unsaid(tmp_path, words):
    path = write(tmp_path / "model.pth", {"state_dict": weights(), **words})
    assert load_checkpoint(path).architecture is None


def test_safetensors_metadata_names_the_architecture(tmp_path):
    metadata = {"format": "pt", "architecture": "vit_a"}
    path = write(tmp_path / "model.safetensors", weights(), metadata=metadata)
    assert load_checkpoint(path).architecture == "vit_a"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.safetensors", "vit_side"),
        ("pytorch_model.bin", "vit_side"),
        ("deit_tiny.pth", None),  # config.json belongs to another file
    ],
)
def test_the_config_of_a_model_hub_names_the_architecture(tmp_path, name, expected):
    config = {"architecture": "vit_side", "num_classes": 1000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_checkpoint(write(tmp_path / name, weights())).architecture == expected


def test_the_file_itself_has_the_last_word_on_its_architecture(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "vit_side"}')
    path = write(tmp_path / "model.safetensors", weights(), metadata={"arch": "vit_a"})
    assert load_checkpoint(path).architecture == "vit_a"


@pytest.mark.parametrize("config", [b"", b"{", b"[1]", b"\xff\xfe", b'{"model_type": "vit"}'])
def test_a_config_that_names_nothing_is_no_obstacle(tmp_path, config):
    (tmp_path / "config.json").write_bytes(config)
    path = write(tmp_path / "model.safetensors", weights())
    assert load_checkpoint(path).architecture is None


# ---- nothing in a file runs


class Evil:
    """Pickles to a call that leaves a mark."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


def evil_calls(mark: Path) -> dict[str, Evil]:
    return {
        "posix.system": Evil(os.system, f"touch '{mark}'"),
        "builtins.eval": Evil(eval, f"open({str(mark)!r}, 'w').close()"),
        "builtins.exec": Evil(exec, f"open({str(mark)!r}, 'w').close()"),
        "os.mkdir": Evil(os.mkdir, str(mark)),
    }


EVIL_CALLS = ("posix.system", "builtins.eval", "builtins.exec", "os.mkdir")
EVIL_FORMATS = {
    "zip": lambda content: saved(content),
    "zip, protocol 4": lambda content: saved(content, pickle_protocol=4),
    "before zip": lambda content: saved(content, _use_new_zipfile_serialization=False),
    "before zip, protocol 4": lambda content: saved(
        content, _use_new_zipfile_serialization=False, pickle_protocol=4
    ),
    **{
        f"pickle, protocol {protocol}": lambda content, protocol=protocol: pickle.dumps(
            content, protocol=protocol
        )
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


def assert_refused_and_nothing_ran(path: Path, mark: Path) -> str:
    with suppress(
        RuntimeError, pickle.UnpicklingError
    ):  # a plain pickle runs, then is no checkpoint
        torch.load(path, weights_only=False)
    assert mark.exists(), "the file would do no harm, so that this test shows nothing"
    mark.rmdir() if mark.is_dir() else mark.unlink()
    message = refusal(path)
    assert not mark.exists()
    return message


@pytest.mark.parametrize("form", EVIL_FORMATS)
@pytest.mark.parametrize("call", EVIL_CALLS)
def test_a_pickle_that_runs_code_is_refused_and_nothing_ran(tmp_path, form, call):
    mark, path = tmp_path / "mark", tmp_path / "evil.pth"
    content = {"model": weights(), "epoch": evil_calls(mark)[call]}
    path.write_bytes(EVIL_FORMATS[form](content))
    assert_refused_and_nothing_ran(path, mark)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_the_message_names_what_wanted_to_run(tmp_path, suffix):
    mark, path = tmp_path / "mark", tmp_path / f"evil{suffix}"
    path.write_bytes(saved({"model": weights(), "hook": evil_calls(mark)["posix.system"]}))
    message = assert_refused_and_nothing_ran(path, mark)
    assert "posix.system" in message
    assert "nothing in it ran" in message
    assert "torch.save(model.state_dict(), path)" in message


@pytest.mark.parametrize("place", ["alone", "among the weights", "in the optimizer", "in the args"])
def test_code_is_refused_wherever_it_hides(tmp_path, place):
    mark, path = tmp_path / "mark", tmp_path / "evil.pth"
    evil = evil_calls(mark)["builtins.eval"]
    content = {
        "alone": evil,
        "among the weights": weights() | {"head.bias": evil},
        "in the optimizer": {"model": weights(), "optimizer": {"state": {0: [evil]}}},
        "in the args": {"model": weights(), "args": argparse.Namespace(model=evil)},
    }[place]
    path.write_bytes(saved(content))
    assert_refused_and_nothing_ran(path, mark)


@pytest.mark.parametrize("opcodes", ["(S'{}'\nios\nsystem\n.", "(cos\nsystem\nS'{}'\no."])
def test_the_old_opcodes_for_a_call_are_refused(tmp_path, opcodes):
    mark, path = tmp_path / "mark", tmp_path / "evil.pth"
    path.write_bytes(opcodes.format(f"touch {mark}").encode())
    assert_refused_and_nothing_ran(path, mark)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", [None, "model"])
def test_whole_pickled_modules_are_refused(tmp_path, wrapper, zipped):
    content = {wrapper: nn.Linear(2, 2)} if wrapper else nn.Linear(2, 2)
    path = tmp_path / "model.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert "torch.nn.modules.linear.Linear" in message
    assert "torch.save(model.state_dict(), path)" in message


# ---- what is no checkpoint


def test_a_missing_file_is_refused(tmp_path):
    assert "no file" in refusal(tmp_path / "gone.pth")


def test_a_link_to_nothing_is_refused(tmp_path):
    (tmp_path / "link.pth").symlink_to(tmp_path / "gone.pth")
    assert "no file" in refusal(tmp_path / "link.pth")


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints.pth"])
def test_a_folder_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    assert "folder" in refusal(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"empty{suffix}"
    path.touch()
    assert "empty (0 bytes)" in refusal(path)


@pytest.mark.parametrize("name", ["model.onnx", "model.ckpt.txt", "model"])
def test_another_suffix_is_refused_with_the_known_ones(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(saved(weights()))
    message = refusal(path)
    assert all(suffix in message for suffix in SUFFIXES)


FORMS = {
    "zip": lambda: (".pth", saved({"model": weights(), "best": np.float64(1)})),
    "before zip": lambda: (
        ".pth",
        saved({"model": weights(), "best": np.float64(1)}, _use_new_zipfile_serialization=False),
    ),
    "safetensors": lambda: (".safetensors", safetensors_bytes()),
}


def safetensors_bytes() -> bytes:
    from safetensors.torch import save

    return save(weights(), {"format": "pt"})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tenth", range(10))
def test_a_file_cut_off_anywhere_is_refused(tmp_path, form, tenth):
    suffix, data = FORMS[form]()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(data)
    load_checkpoint(path)
    for length in range(max(1, len(data) * tenth // 10), len(data) * (tenth + 1) // 10):
        path.write_bytes(data[:length])
        refusal(path)


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_file_is_read_or_refused_but_nothing_else(tmp_path, form):
    suffix, data = FORMS[form]()
    path = tmp_path / f"damaged{suffix}"
    n_refused = 0
    for position in range(0, len(data), 2):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :])
        try:
            load_checkpoint(path)
        except CheckpointError:
            n_refused += 1
    assert n_refused > 100


JUNK = {
    "text": b"these are not the weights\n" * 20,
    "page": b"<!DOCTYPE html>\n<html><title>404 Not Found</title></html>\n",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 22883541\n",
    "zeros": bytes(4096),
    "one byte": b"\x80",
    "zip magic": b"PK\x03\x04",
    "plain pickle": pickle.dumps({"a": 1}, protocol=2),
    "numpy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}",
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("junk", JUNK)
def test_a_file_of_another_kind_is_refused(tmp_path, junk, suffix):
    path = tmp_path / f"junk{suffix}"
    path.write_bytes(JUNK[junk])
    refusal(path)


def test_a_checkpoint_under_the_suffix_of_another_format_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(saved(weights()))
    (tmp_path / "model.pth").write_bytes(safetensors_bytes())
    refusal(tmp_path / "model.safetensors")
    refusal(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({}, "[]"),
        ({"optimizer": {"state": {}}, "epoch": 3}, "['optimizer', 'epoch']"),
        ({"model": {}}, "['model']"),
        ({"model": [1, 2]}, "['model']"),
        ({1: torch.ones(2), 2: torch.ones(2)}, "[1, 2]"),
        ([torch.ones(2)], "list"),
        (torch.ones(2), "Tensor"),
        (None, "NoneType"),
    ],
    ids=repr,
)
def test_a_file_without_a_state_dict_is_refused_with_what_it_holds(tmp_path, content, word):
    message = refusal(write(tmp_path / "model.pth", content))
    assert f"found {word}" in message
    assert "model_state_dict" in message


# ---- what is in the weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_are_not_finite_are_named_and_counted(tmp_path, suffix, kind, value):
    content = {name: tensor.to(kind) for name, tensor in weights().items()}
    content["blocks.0.attn.qkv.bias"][3:8] = value
    message = refusal(write(tmp_path / f"model{suffix}", content))
    assert "'blocks.0.attn.qkv.bias' (5 of 12)" in message


def test_all_tensors_that_are_not_finite_are_counted_and_the_first_is_named(tmp_path):
    content = weights()
    content["cls_token"][0, 0, 1] = float("nan")
    content["patch_embed.proj.weight"][:] = float("inf")
    message = refusal(write(tmp_path / "model.pth", {"model": content}))
    assert "2 tensors" in message
    assert "'cls_token' (1 of 4)" in message
    assert "patch_embed" not in message


def test_weights_beyond_float32_are_not_finite(tmp_path):
    content = weights() | {"norm.bias": torch.tensor([1.0, 1e300], dtype=torch.float64)}
    assert "'norm.bias' (1 of 2)" in refusal(write(tmp_path / "model.pth", content))


@pytest.mark.parametrize(
    ("entry", "kind"), [(3, "int"), ("deit", "str"), (np.ones(3), "ndarray"), ([1.0], "list")]
)
def test_an_entry_that_is_no_tensor_is_named(tmp_path, entry, kind):
    message = refusal(write(tmp_path / "model.pth", weights() | {"norm.bias": entry}))
    assert "'norm.bias'" in message
    assert kind in message


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.eye(3, device="meta"),  # shape without values
        torch.eye(3, dtype=torch.complex64),
    ],
    ids=["sparse", "meta", "complex"],
)
def test_a_tensor_without_plain_values_is_named(tmp_path, tensor):
    message = refusal(write(tmp_path / "model.pth", weights() | {"head.weight": tensor}))
    assert "'head.weight'" in message


# ---- file or name


@pytest.mark.parametrize(
    "model", ["model.pth", "a/b", "./deit", "x.SAFETENSORS", "weights.bin", "m.pt", "a\\b"]
)
def test_a_path_looks_like_a_file(model):
    assert looks_like_file(model)


@pytest.mark.parametrize("model", ["deit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k"])
def test_a_timm_name_does_not_look_like_a_file(model):
    assert not looks_like_file(model)


def test_what_exists_is_a_file_whatever_its_name(tmp_path, monkeypatch):
    (tmp_path / "deit_tiny_patch16_224").touch()
    monkeypatch.chdir(tmp_path)
    assert looks_like_file("deit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html><html>Not found</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "the pointer of a Git LFS"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_stands_in_for_a_download_is_named(tmp_path, content, what, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    assert what in refusal(path)


def test_paths_and_counters_beside_the_weights_are_read(tmp_path):
    beside = {"folder": Path("runs/1"), "meters": defaultdict(list)}
    assert_holds(write(tmp_path / "model.pth", {"model": weights(), **beside}), weights())
