"""Where a model is from: a name, a file or a module; weights that cannot be had; image sizes."""

from __future__ import annotations

import copy
import shutil
import socket
import time

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tomexport import pipeline
from tomexport.errors import CheckpointError, RewriteError, TomexportError, UnknownNameError
from tomexport.exporter.source import Source, find
from tomexport.exporter.weights import weights_sha256
from tomexport.exporter.zoo import preprocessing, supported_names, timm

NAME = "test_vit"
TAGGED = "test_vit.r160_in1k"


def refusal(model, error: type[TomexportError], **options) -> str:
    with pytest.raises(error) as caught:
        find(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def file(tmp_path, seeded):
    path = tmp_path / "mine.pth"
    torch.save(seeded(NAME).state_dict(), path)
    return path


def output_of(model: nn.Module, height: int, width: int) -> torch.Tensor:
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(image)


# ---- names


def test_a_name_with_seeded_weights(seeded):
    found = find(NAME, random_weights=0)
    assert found.names == (NAME,)
    assert found.name == NAME
    assert found.weights == "random, seed 0"
    assert found.preprocessing == preprocessing(NAME)
    assert found.notes == ()
    assert not found.model.training
    assert weights_sha256(found.model) == weights_sha256(seeded(NAME))


def test_another_seed_gives_other_weights():
    shas = {weights_sha256(find(NAME, random_weights=seed).model) for seed in (0, 0, 1, -1)}
    assert len(shas) == 3


@pytest.mark.parametrize("seed", [2**64, -(2**70)])
def test_a_seed_that_is_none_is_refused(seed):
    refusal(NAME, TomexportError, random_weights=seed)


@pytest.mark.parametrize("name", [NAME, TAGGED, "vit_huge_patch14_224"])
def test_a_name_without_its_weights_takes_no_memory(name):
    found = find(name, with_weights=False)
    assert found.names == (name,)
    assert all(parameter.is_meta for parameter in found.model.parameters())


@pytest.mark.parametrize(
    "name",
    [
        TAGGED,
        "deit_tiny_patch16_224.fb_in1k",
        "vit_tiny_patch16_224.augreg_in21k",
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    ],
)
def test_a_tag_belongs_to_the_name(name):
    found = find(name, with_weights=False)
    configuration = timm().get_pretrained_cfg(name)
    assert found.names == (name,)
    assert found.preprocessing is not None
    assert found.preprocessing["mean"] == list(configuration.mean)
    assert found.preprocessing["size"] == list(configuration.input_size[1:])


@pytest.mark.parametrize(
    ("tag", "n_classes"), [("augreg_in21k", 21843), ("augreg_in21k_ft_in1k", 1000)]
)
def test_a_tag_decides_the_number_of_classes(tag, n_classes):
    found = find(f"vit_tiny_patch16_224.{tag}", with_weights=False)
    assert found.model.head.out_features == n_classes


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("test_vit.r161_in1k", "r160_in1k"),
        ("deit_tiny_patch16_224.fb_in1", "fb_in1k"),
        ("vit_tiny_patch16_224.augreg", "augreg_in21k_ft_in1k"),
    ],
)
def test_an_unknown_tag_is_refused_with_the_known_ones(name, known):
    architecture, _, tag = name.partition(".")
    message = refusal(name, UnknownNameError, with_weights=False)
    assert f"{architecture} has no pretrained tag {tag!r}" in message
    assert known in message


@pytest.mark.parametrize("name", ["test_vit.", "test_vit..r160_in1k", ".", "test_vit.r160_in1k."])
@pytest.mark.parametrize("with_weights", [False, True])
def test_dots_without_a_tag_are_refused(name, with_weights):
    refusal(name, TomexportError, with_weights=with_weights)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("deit_tiny_patch16_225", "deit_tiny_patch16_224"),
        ("deit_tinny_patch16_224", "deit_tiny_patch16_224"),
        ("vit_smal_patch16_224", "vit_small_patch16_224"),
        ("deit_tiny_distiled_patch16_224", "deit_tiny_distilled_patch16_224"),
        ("test_vitt", "test_vit"),
    ],
)
@pytest.mark.parametrize("options", [{"with_weights": False}, {"random_weights": 0}, {}])
def test_an_unknown_name_is_refused_with_the_nearest(name, meant, options):
    message = refusal(name, UnknownNameError, **options)
    assert repr(name) in message
    assert f"Did you mean '{meant}'?" in message
    assert ".safetensors" in message


def test_a_name_like_nothing_is_refused_without_a_guess():
    assert "Did you mean" not in refusal("qqqqqqqqqqqq", UnknownNameError)


@pytest.mark.parametrize(
    ("name", "called", "module"),
    [
        ("swin_tiny", "swin_tiny_", "swin_transformer"),
        ("swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224", "swin_transformer"),
        ("resnet50", "resnet50", "resnet"),
        ("resnet50.a1_in1k", "resnet50", "resnet"),
        ("convnext_tiny", "convnext_tiny", "convnext"),
        ("cait_xxs24_224", "cait_xxs24_224", "cait"),
    ],
)
@pytest.mark.parametrize("options", [{"with_weights": False}, {"random_weights": 0}, {}])
def test_a_model_of_another_kind_is_refused_by_name_with_the_reason(name, called, module, options):
    message = refusal(name, RewriteError, **options)
    assert message.startswith(called)
    assert repr(module) in message
    assert "one sequence of tokens" in message
    assert "vision_transformer, deit" in message


# ---- options that do not go together


def test_random_weights_with_a_file_are_refused(file):
    message = refusal(file, RewriteError, random_weights=0)
    assert "mine.pth" in message
    assert "--random-weights" in message


def test_an_architecture_beside_a_name_is_refused():
    message = refusal(NAME, RewriteError, arch="test_vit2", random_weights=0)
    assert "--arch test_vit2" in message
    assert repr(NAME) in message


def test_the_same_architecture_beside_a_name_is_no_contradiction():
    assert find(NAME, arch=NAME, random_weights=0).names == (NAME,)


@pytest.mark.parametrize("options", [{"arch": NAME}, {"random_weights": 0}, {"random_weights": 1}])
def test_options_of_files_and_names_beside_a_module_are_refused(seeded, options):
    refusal(seeded(NAME), RewriteError, **options)


# ---- files and modules


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_file_is_a_model_by_its_weights(file, seeded, kind):
    found = find(kind(file))
    assert found.names == (NAME,)
    assert found.weights == "mine.pth"
    assert found.preprocessing == preprocessing(NAME)
    assert weights_sha256(found.model) == weights_sha256(seeded(NAME))


def test_the_architecture_of_a_file_can_be_named(file):
    assert find(file, arch=TAGGED).names == (TAGGED,)
    assert "test_vit2" in refusal(file, CheckpointError, arch="test_vit2")


@pytest.mark.parametrize("path", ["gone.pth", "no/such/folder", "./deit_tiny_patch16_224"])
@pytest.mark.parametrize("options", [{}, {"arch": NAME}, {"random_weights": 0}])
def test_a_path_that_leads_nowhere_is_refused_as_a_file(tmp_path, monkeypatch, path, options):
    monkeypatch.chdir(tmp_path)
    assert "There is no file" in refusal(path, CheckpointError, **options)


def test_a_module_is_taken_as_it_is(seeded):
    model = seeded(NAME)
    assert find(model).model is model


def test_a_module_without_a_name_is_called_by_its_class():
    found = find(nn.Linear(2, 2))
    assert (found.name, found.names, found.preprocessing) == ("Linear", (), None)


# ---- pretrained weights


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache, and no network: whoever connects is refused at once and counted."""
    attempts = []

    def refuse(*arguments, **options):
        attempts.append(arguments)
        raise OSError(101, "Network is unreachable")

    for variable in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


@pytest.fixture
def slept(monkeypatch):
    """What the code under test sleeps, in seconds; it does not really sleep."""
    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)
    return naps


@pytest.mark.parametrize("name", [NAME, TAGGED, "deit_tiny_patch16_224"])
def test_weights_out_of_reach_are_refused_at_once_with_the_ways_to_go_on(offline, slept, name):
    began = time.monotonic()
    message = refusal(name, CheckpointError)
    assert time.monotonic() - began + sum(slept) < 20
    assert offline, "the test shows nothing if nobody tried to connect"
    assert f"The pretrained weights of {name} are out of reach" in message
    assert "Network is unreachable" in message
    assert f"--arch {name.partition('.')[0]}" in message
    assert "--random-weights 0" in message


def test_a_host_that_never_answers_is_given_up_soon(offline, slept, monkeypatch):
    waited = []

    def hang(address, timeout=None, **options):
        waited.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", hang)
    message = refusal(NAME, CheckpointError)
    assert "timed out" in message
    assert waited
    assert None not in waited
    assert sum(waited) + sum(slept) < 20


def test_a_proxy_that_does_not_answer_is_given_up_soon(offline, slept, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    message = refusal(NAME, CheckpointError)
    assert "--random-weights 0" in message
    assert sum(slept) < 20


def test_offline_by_choice_is_refused_without_an_attempt(offline, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "--random-weights 0" in refusal(NAME, CheckpointError)


def test_a_name_that_was_never_trained_is_refused_with_the_ways_to_go_on(offline):
    assert "test_vit4" in supported_names()
    message = refusal("test_vit4", CheckpointError)
    assert "timm has no pretrained weights for test_vit4" in message
    assert "--arch test_vit4" in message
    assert "--random-weights 0" in message
    assert not offline


def test_weights_in_the_cache_need_no_network(offline, monkeypatch, tmp_path, seeded):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    entry = tmp_path / "cache" / "models--timm--test_vit.r160_in1k"
    snapshot = entry / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0" * 40)
    save_file(seeded(NAME).state_dict(), snapshot / "model.safetensors")
    found = find(NAME)
    assert found.weights == "timm, pretrained"
    assert weights_sha256(found.model) == weights_sha256(seeded(NAME))
    assert not found.model.training
    assert not offline

    shutil.rmtree(snapshot)
    refusal(NAME, CheckpointError)


# ---- image size


def resized_by_timm(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    resized = copy.deepcopy(model)
    resized.set_input_size(img_size=size)
    return resized


@pytest.mark.parametrize("size", [(224, 224), (96, 128), (16, 320)])
@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3"])
def test_another_image_size_resamples_as_timm_does_and_leaves_the_model_alone(seeded, name, size):
    model = seeded(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = find(model, img_size=size)
    expected = resized_by_timm(model, size)

    state = found.model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.state_dict().items())
    assert not torch.equal(state["pos_embed"], before["pos_embed"])
    assert torch.equal(output_of(found.model, *size), output_of(expected, *size))

    assert found.model is not model
    assert tuple(model.patch_embed.img_size) == (160, 160)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    assert f"positions resampled from 160×160 to {size[0]}×{size[1]} pixels" in found.notes


def test_a_file_and_a_name_are_resized_too(file, seeded):
    expected = weights_sha256(resized_by_timm(seeded(NAME), (96, 96)))
    from_file = find(file, img_size=(96, 96))
    from_name = find(NAME, random_weights=0, img_size=(96, 96))
    for found in (from_file, from_name):
        assert isinstance(found, Source)
        assert found.names == (NAME,)
        assert weights_sha256(found.model) == expected
    assert len(from_file.notes) == 2  # how it was found, and that it was resized


def test_a_plan_for_another_size_needs_no_weights():
    found = find(NAME, with_weights=False, img_size=(192, 192))
    assert found.model.pos_embed.shape == (1, 145, 64)


def test_its_own_image_size_changes_nothing(seeded):
    found = find(seeded(NAME), img_size=(160, 160))
    assert found.model is seeded(NAME)
    assert found.notes == ()


@pytest.mark.parametrize(
    ("size", "near"),
    [
        ((165, 165), (160, 160)),
        ((170, 170), (176, 176)),
        ((160, 161), (160, 160)),
        ((225, 100), (224, 96)),
        ((3, 3), (16, 16)),
    ],
)
def test_a_size_that_does_not_divide_into_patches_is_refused_with_the_nearest(seeded, size, near):
    message = refusal(seeded(NAME), RewriteError, img_size=size)
    assert f"{size[0]}×{size[1]}" in message
    assert "patches of 16×16" in message
    assert f"the nearest that does is {near[0]}×{near[1]}" in message


def test_a_module_of_another_kind_has_no_image_size():
    assert "Linear" in refusal(nn.Linear(2, 2), RewriteError, img_size=(160, 160))


def test_what_was_found_is_found_again():
    found = find("test_vit", random_weights=0)
    assert find(found) is found
    assert "This model was found already" in refusal(found, RewriteError, random_weights=1)
    assert pipeline.plan(found, "const:4").model == "test_vit"
