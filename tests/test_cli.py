"""The command line: one result on stdout, one line for an error, nothing left behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import platform
import re
import resource
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import torch

import tomexport
from tomexport.cli import main
from tomexport.exporter.zoo import timm

MODEL = "test_vit"  # 160 pixels, 6 blocks, 101 tokens of width 64
SEEDED = (MODEL, "--random-weights", "0")
SCRIPT = str(Path(sysconfig.get_path("scripts")) / "tomexport")
N_BYTES_OF_WEIGHTS = 371_240 * 4


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    def error(self) -> str:
        """Return the one line of a refusal."""
        assert self.code == 2
        assert self.out == ""
        assert self.err.startswith("error: ")
        assert self.err.count("\n") == 1
        assert self.err.endswith("\n")
        assert "Traceback" not in self.err
        return self.err


@pytest.fixture
def run(capsys) -> Iterator[Callable[..., Outcome]]:
    """Run a command line in this process."""
    on_sigterm = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    yield call
    signal.signal(signal.SIGTERM, on_sigterm)


def spawn(*arguments: object, disk: int | None = None) -> Outcome:
    """Run a command line in a process of its own, where no file can grow beyond `disk` bytes."""
    command = [sys.executable, "-m", "tomexport", *map(str, arguments)]
    if disk is not None:
        limit = (
            "import os, resource, sys\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({disk}, {disk}))\n"
            "os.execv(sys.executable, sys.argv[1:])\n"
        )
        command = [sys.executable, "-c", limit, *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return Outcome(done.returncode, done.stdout, done.stderr)


def listing(folder: Path) -> dict[str, bytes | None]:
    """Return every path under a folder, hidden ones too, and what the files hold."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session")
def weights(seeded, tmp_path_factory) -> Path:
    """A saved state dict."""
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save(seeded(MODEL).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def export(weights, tmp_path_factory) -> tuple[Path, Outcome]:
    """An export for people over an older file, by the default command, and what it said."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    path.write_text("an older one")
    out, err = io.StringIO(), io.StringIO()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(weights), "--schedule", "const:8", "-o", str(path), "--force"])
    signal.signal(signal.SIGTERM, on_sigterm)
    return path, Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def exported(export) -> Path:
    """An exported file. Do not change it."""
    return export[0]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder, where the command runs."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# ---- refusals


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("it-ran",)


def _write(name: str, data: bytes) -> Callable[[dict[str, Any]], None]:
    def prepare(state: dict[str, Any]) -> None:
        del state
        Path(name).write_bytes(data)

    return prepare


def _save(name: str, change: Callable[[dict[str, Any]], Any], **options: Any) -> Callable:
    return lambda state: torch.save(change(dict(state)), name, **options)


def _truncated(share: float, **options: Any) -> Callable[[dict[str, Any]], None]:
    def prepare(state: dict[str, Any]) -> None:
        path = Path("cut.pth")
        torch.save(state, path, **options)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return prepare


def _without(*keys: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {key: tensor for key, tensor in state.items() if key not in keys}


def _with_nan(state: dict[str, Any]) -> dict[str, Any]:
    broken = state["blocks.1.norm1.weight"].clone()
    broken[:3] = float("nan")
    return state | {"blocks.1.norm1.weight": broken}


def _of(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: timm().create_model(name).state_dict()


OLD = {"_use_new_zipfile_serialization": False}
BAD_FILES = {
    "missing file": ("gone.pth", None, ["no file gone.pth"]),
    "folder": ("folder", lambda state: Path("folder").mkdir(), ["folder"]),
    "folder like a file": ("m.pth", lambda state: Path("m.pth").mkdir(), ["m.pth is a folder"]),
    "empty file": ("empty.pth", _write("empty.pth", b""), ["empty.pth is empty"]),
    "empty safetensors": ("e.safetensors", _write("e.safetensors", b""), ["is empty"]),
    "truncated": ("cut.pth", _truncated(0.5), ["cut.pth", "cut off"]),
    "truncated at the end": ("cut.pth", _truncated(0.999), ["cut.pth", "cut off"]),
    "truncated at the start": ("cut.pth", _truncated(0.001), ["cut.pth"]),
    "truncated, old format": ("cut.pth", _truncated(0.5, **OLD), ["cut.pth", "cut off"]),
    "text": ("text.pth", _write("text.pth", b"not the weights\n" * 9), ["text.pth"]),
    "text safetensors": ("t.safetensors", _write("t.safetensors", b"not the weights\n"), ["t.s"]),
    "evil pickle": (
        "evil.pth",
        _save("evil.pth", lambda state: {"model": state, "hook": Evil()}),
        ["evil.pth", "posix.mkdir", "nothing in it ran"],
    ),
    "evil pickle, old format": (
        "evil.pth",
        _save("evil.pth", lambda state: {"model": state, "hook": Evil()}, **OLD),
        ["evil.pth", "posix.mkdir", "nothing in it ran"],
    ),
    "evil pickle, protocol 4": (
        "evil.bin",
        _write("evil.bin", pickle.dumps(Evil(), protocol=4)),
        ["evil.bin"],
    ),
    "another model": ("resnet.pth", _save("resnet.pth", _of("test_resnet")), ["resnet.pth"]),
    "another transformer": (
        "v.pth",
        _save("v.pth", _of("xcit_nano_12_p16_224")),
        ["v.pth (12 blocks) fits no supported timm name"],
    ),
    "missing key": (
        "less.pth",
        _save("less.pth", _without("blocks.2.attn.proj.bias")),
        ["1 key missing: blocks.2.attn.proj.bias"],
    ),
    "missing keys": (
        "less.pth",
        _save("less.pth", _without("cls_token", "norm.weight", "norm.bias")),
        ["3 keys missing: cls_token, norm.weight, norm.bias"],
    ),
    "unexpected key": (
        "more.pth",
        _save("more.pth", lambda state: state | {"extra": state["norm.bias"]}),
        ["1 key unexpected: extra"],
    ),
    "NaN": ("nan.pth", _save("nan.pth", _with_nan), ["blocks.1.norm1.weight", "3 of 64"]),
    "no state dict": ("n.pth", _save("n.pth", lambda state: {"epoch": 3}), ["epoch"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("suffix", ["onnx", "xml"])
def test_a_file_that_is_not_the_weights_is_refused(run, here, seeded, case, suffix):
    model, prepare, words = BAD_FILES[case]
    if prepare:
        prepare(seeded(MODEL).state_dict())
    before = listing(here)
    error = run(model, "--schedule", "const:8", "-o", f"out.{suffix}").error()
    assert all(word in error for word in words)
    assert listing(here) == before


@pytest.mark.parametrize("case", BAD_FILES)
def test_no_plan_is_made_of_it_either(run, here, seeded, case):
    model, prepare, words = BAD_FILES[case]
    if prepare:
        prepare(seeded(MODEL).state_dict())
    before = listing(here)
    error = run("plan", model, "--schedule", "const:8").error()
    assert all(word in error for word in words)
    assert listing(here) == before


BAD_NAMES = {
    "deit_tiny_patch16_225": ["Did you mean 'deit_tiny_patch16_224'?"],
    "deit_tinny_patch16_224": ["Did you mean 'deit_tiny_patch16_224'?"],
    "test_vit.r161_in1k": ["Did you mean 'r160_in1k'?"],
    "swin_tiny": ["swin_tiny_", "'swin_transformer'"],
    "swin_tiny_patch4_window7_224": ["swin_tiny_patch4_window7_224", "'swin_transformer'"],
    "resnet50": ["resnet50", "'resnet'"],
}


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("command", ["export", "plan"])
def test_a_name_that_cannot_be_reduced_is_refused(run, here, name, command):
    more = ["--random-weights", "0", "-o", "out.onnx"] if command == "export" else []
    error = run(command, name, "--schedule", "const:8", *more).error()
    assert all(word in error for word in BAD_NAMES[name])
    assert listing(here) == {}


BAD_SCHEDULES = {
    "exp:2,0": ["R_INIT is 2", "0 to 1"],
    "exp:0.25": ["1 number", "exp:0.25,0"],
    "exp:nan,0": ["R_INIT is 'nan'"],
    "exp:0.25,0,0": ["3 numbers"],
    "exp:inf,0": ["R_INIT is 'inf'"],
    "const:-1": ["'-1'"],
    "const:x": ["'x'"],
    "const:": ["is empty"],
    "const": ["is empty"],
    "const:8,8": ["list:8,8"],
    "list:8,,8": ["number 2 is empty"],
    "list:1,1,1,1,1,1,1": ["7 numbers", "6 sites"],
    "liner:8": ["'liner:8'", "linear:R"],
    "": ["const:R"],
}


@pytest.mark.parametrize("schedule", BAD_SCHEDULES)
@pytest.mark.parametrize("command", ["export", "plan"])
def test_a_schedule_that_cannot_be_is_refused(run, here, schedule, command):
    more = ["--random-weights", "0", "-o", "out.onnx"] if command == "export" else []
    error = run(command, MODEL, "--schedule", schedule, *more).error()
    assert all(word in error for word in BAD_SCHEDULES[schedule])
    assert listing(here) == {}


BAD_OPTIONS = {
    "--batch 0": ["batch of 0"],
    "--batch -1": ["batch of -1"],
    "--batch x": ["'x'", "dynamic"],
    "--batch 1.5": ["'1.5'"],
    "--batch": ["--batch"],
    "--opset 17": ["Opset 17"],
    "--opset x": ["'x'"],
    "--ops fancy": ["'fancy'", "custom, portable"],
    "--method tomme": ["Did you mean 'tome'?"],
    "--img-size 165": ["165×165", "160×160"],
    "--img-size 0": ["'0'"],
    "--img-size 160x": ["'160x'"],
    "--img-size ²": ["'²'"],
    "--half": ["--half"],
    "--images nowhere": ["no folder nowhere"],
    "--random-weights 1.5": ["'1.5'"],
    "--random-weights 99999999999999999999": ["99999999999999999999"],
    "--forse": ["'--forse'", "--force"],
    "extra": ["(extra)"],
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_an_option_that_cannot_be_is_refused(run, here, options):
    error = run(*SEEDED, "--schedule", "const:8", "-o", "out.onnx", *options.split()).error()
    assert all(word in error for word in BAD_OPTIONS[options])
    assert listing(here) == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*SEEDED, "-o", "out.onnx"], ["--schedule"]),
        ([*SEEDED, "--schedule", "none"], ["--out"]),
        (["export", "--schedule", "none", "-o", "out.onnx"], ["MODEL"]),
        (["plan", MODEL], ["--schedule"]),
        (["plan", "--schedule", "none"], ["MODEL"]),
        (["verify"], ["ARTIFACT"]),
    ],
)
def test_what_is_left_out_is_named(run, here, arguments, words):
    error = run(*arguments).error()
    assert all(word in error for word in words)
    assert "--help" in error
    assert listing(here) == {}


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("out.tflite", ["'.tflite'", ".onnx", ".xml"]),
        ("out", ["''", ".onnx", ".xml"]),
        ("out.ONNX.pth", ["'.pth'"]),
        ("absent/out.onnx", ["no folder absent", "out.onnx"]),
        ("absent/out.xml", ["no folder absent"]),
        ("folder.onnx", ["folder.onnx is a folder"]),
        ("old.onnx", ["old.onnx exists already", "--force"]),
        ("old.xml", ["old.xml", "old.bin", "--force"]),
        ("half.xml", ["half.bin", "--force"]),
        ("old.onnx/out.onnx", ["no folder old.onnx"]),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(run, here, output, words):
    (here / "folder.onnx").mkdir()
    for name in ("old.onnx", "old.xml", "old.bin", "half.bin"):
        (here / name).write_text("precious")
    before = listing(here)
    error = run(*SEEDED, "--schedule", "const:8", "-o", output).error()
    assert all(word in error for word in words)
    assert listing(here) == before


def test_the_checkpoint_is_not_overwritten_even_by_force(run, here, weights):
    (here / "model.bin").write_bytes(weights.read_bytes())
    before = listing(here)
    error = run("model.bin", "--schedule", "const:8", "-o", "model.xml", "--force").error()
    assert "model.bin" in error
    assert listing(here) == before


@pytest.mark.parametrize(
    ("artifact", "data", "words"),
    [
        ("gone.onnx", None, ["no file gone.onnx"]),
        ("empty.onnx", b"", ["empty.onnx"]),
        ("text.onnx", b"not a graph\n" * 9, ["text.onnx"]),
        ("text.xml", b"not a graph\n" * 9, ["text.xml"]),
        ("model.pth", b"weights", ["'.pth'", ".onnx", ".xml"]),
        (".", None, [".onnx"]),
    ],
)
def test_verify_refuses_what_is_no_file_of_tomexports(run, here, artifact, data, words):
    if data is not None:
        (here / artifact).write_bytes(data)
    error = run("verify", artifact).error()
    assert all(word in error for word in words)


def test_verify_refuses_a_graph_without_metadata(run, here):
    shape = [1, 3, 160, 160]
    image, out = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name in ("image", "out")
    )
    node = onnx.helper.make_node("Relu", ["image"], ["out"])
    graph = onnx.helper.make_graph([node], "foreign", [image], [out])
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), "foreign.onnx")
    error = run("verify", "foreign.onnx").error()
    assert "foreign.onnx carries no tomexport metadata" in error


def test_verify_refuses_a_file_without_its_golden_set(run, here, exported):
    model = onnx.load(exported)
    kept = [entry for entry in model.metadata_props if not entry.key.endswith("golden")]
    assert len(kept) == len(model.metadata_props) - 1
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, "model.onnx")
    assert "golden set" in run("verify", "model.onnx").error()


@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_verify_refuses_a_file_that_was_cut_off(run, here, exported, share):
    data = exported.read_bytes()
    Path("cut.onnx").write_bytes(data[: int(len(data) * share)])
    assert "cut.onnx" in run("verify", "cut.onnx").error()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--backend onnxruntim", ["Did you mean 'onnxruntime'?"]),
        ("--device TPU", ["'TPU'", "CPU"]),
        ("--precision f64", ["'f64'", "f32"]),
        ("--images nowhere --against test_vit", ["no folder nowhere"]),
        ("--against gone.pth", ["no file gone.pth"]),
    ],
)
def test_verify_refuses_what_is_not_there(run, here, exported, options, words):
    error = run("verify", exported, *options.split()).error()
    assert all(word in error for word in words)


# ---- commands


@pytest.mark.parametrize(
    ("typed", "meant"), [("plna", "plan"), ("verfy", "verify"), ("exprot", "export"),
                         ("docter", "doctor")],
)  # fmt: skip
def test_a_misspelt_command_is_refused_with_the_nearest(run, here, typed, meant):
    error = run(typed, MODEL, "--schedule", "none").error()
    assert f"No command {typed!r}. Did you mean {meant!r}?" in error
    assert listing(here) == {}


def test_a_model_called_like_a_misspelt_command_is_still_a_model(run, here):
    (here / "verfy").mkdir()
    assert "verfy is a folder" in run("verfy", "--schedule", "none", "-o", "out.onnx").error()


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", MODEL, "--schedule", "none", "-o", "out.tflite"],
        [MODEL, "--schedule", "none", "-o", "out.tflite"],
        ["--schedule", "none", "-o", "out.tflite", MODEL],
        ["-o", "out.tflite", MODEL, "--schedule", "none"],
    ],
)
def test_export_is_the_default_command(run, here, arguments):
    assert "out.tflite: the suffix '.tflite' says no format" in run(*arguments).error()


def test_without_arguments_the_usage_is_shown(run):
    outcome = run()
    assert (outcome.out + outcome.err).startswith("Usage: tomexport")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_shows_the_commands_line_by_line(run, option):
    outcome = run(option)
    assert (outcome.code, outcome.err) == (0, "")
    lines = [
        line.split("  ")[0].strip() for line in outcome.out.replace("  tom", "tom").split("\n")
    ]
    assert "tomexport MODEL --schedule S -o OUT" in lines
    assert "tomexport verify FILE" in lines
    assert "\\b" not in outcome.out


@pytest.mark.parametrize(
    "command",
    ["export", "plan", "verify", "doctor", "kernels build", "kernels list", "kernels clean"],
)
def test_each_command_has_its_help(run, command):
    outcome = run(*command.split(), "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"Usage: tomexport {command}")
    assert "--json" in outcome.out


def test_the_version_is_shown(run):
    assert run("--version") == Outcome(0, f"tomexport, version {tomexport.__version__}\n", "")


def test_help_is_quick_and_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from tomexport.__main__ import main\n"
        "sys.argv = ['tomexport', '--help']\n"
        "code = main()\n"
        "heavy = {'torch', 'timm', 'onnx', 'onnxscript', 'onnxruntime', 'openvino', 'numpy'}\n"
        "sys.exit(code or ' '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

    seconds = []
    for _ in range(3):  # the least of three, because others share the machine
        process = subprocess.Popen([SCRIPT, "--help"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert min(seconds) < 0.5


def test_the_module_is_the_command(here):
    for arguments in (["--version"], ["plan", "--help"], [MODEL, "--schedule", "const:x"]):
        script = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True)
        assert spawn(*arguments) == Outcome(script.returncode, script.stdout, script.stderr)


def test_debug_shows_where_an_error_is_from(here):
    arguments = ["plan", MODEL, "--schedule", "const:x"]
    quiet, loud = spawn(*arguments), spawn(*arguments, "--debug")
    message = quiet.error().removeprefix("error: ").strip()
    assert "Traceback (most recent call last)" in loud.err
    assert "plan.py" in loud.err
    assert message in loud.err
    assert loud.out == ""
    assert loud.code == 2  # as without; 1 would say that a check failed


# ---- plan


INTEGERS = ("stage", "call", "tokens_in", "requested", "removed", "tokens_out", "macs")


def test_plan_as_json(run):
    outcome = run("plan", "deit_tiny_patch16_224", "--schedule", "const:16", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    data = json.loads(outcome.out)
    sites = data["sites"]
    assert [site["block"] for site in sites] == [f"blocks.{i}" for i in range(12)]
    assert all(type(site[key]) is int for site in sites for key in INTEGERS)
    assert [site["requested"] for site in sites] == [16] * 12
    assert [site["tokens_out"] for site in sites] == [
        181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11,
    ]  # fmt: skip
    assert all(site["tokens_in"] - site["removed"] == site["tokens_out"] for site in sites)
    assert [site["tokens_in"] for site in sites] == [197, *(s["tokens_out"] for s in sites[:-1])]
    assert data["removed_total"] == sum(site["removed"] for site in sites) == 186
    for key in ("removed_total", "macs", "macs_unreduced"):
        assert type(data[key]) is int
    assert sum(site["macs"] for site in sites) < data["macs"] < data["macs_unreduced"]
    assert data["macs_unreduced"] == pytest.approx(1.26e9, rel=0.01)  # as published
    assert (data["model"], data["method"]) == ("deit_tiny_patch16_224", "tome")
    assert data["schedule"] == "const:16"
    assert any("16 → 10" in note for note in data["notes"])


@pytest.mark.parametrize("method", [(), ("--method", "tome")])
def test_options_of_a_method_are_part_of_its_name(run, method):
    options = ("--metric", "x-before", "--combine", "max", "--similarity", "cosine")
    result = run("plan", MODEL, "--schedule", "const:8", *method, *options, "--json")
    assert json.loads(result.out)["method"] == "tome:combine=max,metric=x-before"
    refused = run("plan", MODEL, "--schedule", "const:8", "--method", "random", *options)
    assert "Unknown option of random" in refused.error()


def test_plan_as_a_table(run):
    outcome = run("plan", MODEL, "--schedule", "const:30")
    assert (outcome.code, outcome.err) == (0, "")
    rows = [line.split() for line in outcome.out.splitlines()]
    blocks = [row for row in rows if row and row[0].startswith("blocks.")]
    tokens = [[cell for cell in row[1:] if cell.isdigit()][:4] for row in blocks]
    assert tokens == [
        ["101", "30", "30", "71"],
        ["71", "30", "30", "41"],
        ["41", "30", "20", "21"],
        ["21", "30", "10", "11"],
        ["11", "30", "5", "6"],
        ["6", "30", "2", "4"],
    ]
    assert "removed 97 tokens in all" in outcome.out
    assert "capped" in outcome.out


def test_plan_of_a_file_is_the_plan_of_its_name(run, weights):
    by_file = run("plan", weights, "--schedule", "exp:0.25,0", "--json")
    by_name = run("plan", MODEL, "--schedule", "exp:0.25,0", "--json")
    assert json.loads(by_file.out)["sites"] == json.loads(by_name.out)["sites"]


# ---- export and verify


def assert_only_notes(err: str) -> None:
    assert all(line.startswith("note: ") for line in err.splitlines())


def test_export_as_json(run, here, weights):
    outcome = run("export", weights, "--schedule", "list:8,0,30", "-o", "model.xml", "--json")
    assert outcome.code == 0
    data = json.loads(outcome.out)
    files = {Path(name).name: size for name, size in data["files"].items()}
    assert files == {path.name: path.stat().st_size for path in here.iterdir()}
    assert set(files) == {"model.xml", "model.bin"}
    assert data["path"] == "model.xml"
    assert data["verify"]["passed"] is True
    assert data["verify"]["path"] == "model.xml"
    assert data["metadata"]["names"] == [MODEL]
    assert [s["removed"] for s in data["metadata"]["plan"]["sites"]] == [8, 0, 30, 0, 0, 0]
    assert_only_notes(outcome.err)
    assert f"note: architecture {MODEL}, found by shapes\n" in outcome.err
    assert "3 of 6 sites" in outcome.err


def test_export_for_people_over_an_older_file(export):
    path, outcome = export
    assert outcome.code == 0
    assert "101 → 53 tokens" in outcome.out
    assert f"saved: {path}" in outcome.out.replace("\n", "")
    assert "pass" in outcome.out
    assert_only_notes(outcome.err)
    assert list(listing(path.parent)) == ["model.onnx"]
    assert path.stat().st_size > N_BYTES_OF_WEIGHTS


def test_verify_as_json(run, exported):
    outcome = run("verify", exported, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    data = json.loads(outcome.out)
    assert data["passed"] is True
    gated = [run for run in data["runs"] if run["gated"]]
    assert {run["backend"] for run in gated} == {"onnxruntime", "openvino"}
    assert all(run["max_abs"] < 1e-4 and run["failures"] == [] for run in gated)


def test_verify_for_people(run, exported):
    outcome = run("verify", exported, "--backend", "onnxruntime")
    assert (outcome.code, outcome.err) == (0, "")
    assert "pass" in outcome.out
    assert "FAIL" not in outcome.out


def altered(source: Path, target: Path, shape: tuple[int, ...]) -> None:
    """Change one number of the first weight of a shape."""
    model = onnx.load(source)
    tensor = next(t for t in model.graph.initializer if tuple(t.dims) == shape)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[values.size // 2] += np.float32(0.5)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, target)


@pytest.mark.parametrize("shape", [(1000,), (64, 192), (192, 64), (64,), (64, 3, 16, 16)])
def test_verify_exits_1_on_altered_weights(run, here, exported, shape):
    altered(exported, here / "altered.onnx", shape)
    outcome = run("verify", "altered.onnx", "--backend", "onnxruntime")
    assert "FAIL" in outcome.out
    assert (outcome.code, outcome.err) == (1, "")


def test_verify_as_json_exits_1_on_altered_weights_with_one_document(run, here, exported):
    altered(exported, here / "altered.onnx", (1000,))
    outcome = run("verify", "altered.onnx", "--json")
    data = json.loads(outcome.out)
    assert data["passed"] is False
    failed = [run["backend"] for run in data["runs"] if not run["passed"]]
    assert set(failed) == {"onnxruntime", "openvino"}
    assert (outcome.code, outcome.err) == (1, "")


def test_doctor_as_json(run):
    outcome = run("doctor", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert {"machine", "packages", "runtimes"} <= set(json.loads(outcome.out))


def test_doctor_for_people_says_which_kernels_load(run, fused):
    run("kernels", "build", "--runtime", "onnxruntime")
    outcome = run("doctor")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"load from {fused}" in outcome.out
    assert "cmake" in outcome.out


# ---- kernels


def test_kernels_are_built_listed_and_cleaned(run, fused, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("TOMEXPORT_CACHE", str(cache))
    outcome = run("kernels", "list")
    assert (outcome.code, outcome.err) == (0, "")
    assert "holds no kernels yet" in outcome.out.replace("\n", " ")

    outcome = run("kernels", "build", "--runtime", "onnxruntime")
    assert (outcome.code, outcome.err) == (0, "")  # where pytest takes the log
    path = Path(re.fullmatch(r"built: (.*) \(\d+ KiB\)\n", outcome.out)[1])
    assert path.is_relative_to(cache)

    outcome = run("kernels", "list")
    assert re.search(r"onnxruntime +\S+ +native +\d+ KiB +\d{4}-\d\d-\d\d .* in use", outcome.out)
    data = json.loads(run("kernels", "list", "--json").out)
    assert data["cache"] == str(cache)
    (entry,) = data["libraries"]
    assert (entry["path"], entry["in_use"], entry["error"]) == (str(path), True, None)

    outcome = run("kernels", "clean")
    assert outcome.code == 0
    assert re.fullmatch(rf"removed 1 library \(\d+ KiB\) from {cache}\n", outcome.out)
    assert not path.exists()
    assert json.loads(run("kernels", "clean", "--json").out)["removed"] == 0


def test_kernels_for_another_machine(run, here, compiler):
    outcome = run("kernels", "build", "--runtime", "onnxruntime", "--march", "x86-64-v3",
                  "--out", ".", "--json")  # fmt: skip
    if platform.machine() != "x86_64":
        outcome.error()
        return
    (entry,) = json.loads(outcome.out)["libraries"]
    assert [entry["path"]] == list(listing(here))
    assert entry["march"] == "x86-64-v3"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("build --runtime onnx", ["Unknown runtime 'onnx'", "onnxruntime"]),
        ("build --march armv8-a", ["this machine only", "--out DIR"]),
        ("build --march armv8-a --out absent", ["no folder absent"]),
        ("build --toolchain absent.cmake --out .", ["no toolchain file absent.cmake"]),
        ("build --march a;b --out .", ["'a;b' is no architecture"]),
        ("biuld", ["biuld"]),
    ],
)
def test_kernels_that_cannot_be_built_are_refused(run, here, arguments, words):
    error = run("kernels", *arguments.split()).error()
    assert all(word in error for word in words)
    assert listing(here) == {}


def test_a_failed_build_says_why_and_where_the_log_is(run, here, monkeypatch, compiler):
    monkeypatch.setenv("TOMEXPORT_CACHE", str(here / "cache"))
    monkeypatch.setenv("CXX", "false")
    error = run("kernels", "build", "--runtime", "onnxruntime").error()
    assert "could not be built" in error
    log = re.search(r"The log is (\S+build\.log)", error)
    assert log
    assert Path(log[1]).read_text()
    assert "failed" in run("kernels", "list").out


def test_the_line_while_building_goes_to_stderr(exported, tmp_path, monkeypatch, compiler):
    monkeypatch.setenv("TOMEXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TOMEXPORT_KERNELS")
    outcome = spawn("verify", exported, "--backend", "onnxruntime", "--json")
    assert outcome.code == 0
    assert [entry["kernels"] for entry in json.loads(outcome.out)["runs"]] == [True, False]
    assert outcome.err.startswith("tomexport: building fused kernels for onnxruntime")
    assert outcome.err.count("\n") == 1


def test_verify_says_which_form_is_which(run, exported, fused):
    outcome = run("verify", exported, "--backend", "onnxruntime")
    assert (outcome.code, outcome.err) == (0, "")
    assert re.search(r"onnxruntime f32 fused .* pass", outcome.out)
    assert re.search(r"onnxruntime f32 standard .* pass", outcome.out)
    assert max(map(len, outcome.out.splitlines()[1:4])) <= 80
    outcome = run("verify", exported, "--kernels", "off")
    assert "fused" not in outcome.out
    assert "no library nowhere.so" in run("verify", exported, "--kernels", "nowhere.so").error()


# ---- disk full


@contextlib.contextmanager
def disk_of(n_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_older_file_as_it_was(here):
    (here / "out.onnx").write_text("precious")
    options = ["--schedule", "const:8", "-o", "out.onnx", "--no-verify", "--force"]
    outcome = spawn(*SEEDED, *options, disk=N_BYTES_OF_WEIGHTS // 2)
    assert "out.onnx could not be written" in outcome.error()
    assert listing(here) == {"out.onnx": b"precious"}


@pytest.mark.parametrize("full", ["from the start", "when the graph is there"])
def test_a_full_disk_leaves_no_part_of_an_ir(run, here, monkeypatch, full):
    save_model = openvino.save_model

    def save_on_a_full_disk(*arguments: Any, **options: Any) -> None:
        with disk_of(N_BYTES_OF_WEIGHTS - 1):  # enough for the .xml, not for its .bin
            save_model(*arguments, **options)

    monkeypatch.setattr(openvino, "save_model", save_on_a_full_disk)
    options = ["--schedule", "const:8", "-o", "out.xml", "--no-verify"]
    if full == "from the start":
        with disk_of(N_BYTES_OF_WEIGHTS // 2):
            error = run(*SEEDED, *options).error()
    else:
        error = run(*SEEDED, *options).error()
        assert "disk may be full" in error
    assert "out.xml" in error or "The IR" in error
    assert listing(here) == {}


# ---- interrupted


def _catches_sigterm(process: subprocess.Popen, here: Path) -> bool:
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def _has_loaded(library: str) -> Callable[[subprocess.Popen, Path], bool]:
    return lambda process, here: library in Path(f"/proc/{process.pid}/maps").read_text()


def _is_writing(process: subprocess.Popen, here: Path) -> bool:
    return any(here.iterdir())


def _is_verifying(process: subprocess.Popen, here: Path) -> bool:
    return _is_writing(process, here) and _has_loaded("onnxruntime")(process, here)


STAGES: dict[str, Callable[[subprocess.Popen, Path], bool]] = {
    "parsing": _catches_sigterm,
    "loading torch": _has_loaded("libtorch_cpu"),
    "loading onnx": _has_loaded("onnx_cpp2py_export"),
    "writing": _is_writing,
    "verifying": _is_verifying,
}


@pytest.mark.parametrize(
    ("stage", "delay", "sent"),
    [
        ("parsing", 0.0, signal.SIGINT),
        ("parsing", 0.3, signal.SIGINT),
        ("loading torch", 0.0, signal.SIGINT),
        ("loading torch", 1.5, signal.SIGTERM),
        ("loading onnx", 0.0, signal.SIGINT),
        ("loading onnx", 0.5, signal.SIGINT),
        ("writing", 0.0, signal.SIGTERM),
        ("verifying", 0.0, signal.SIGINT),
    ],
)
def test_a_signal_ends_an_export_and_leaves_nothing(here, stage, delay, sent):
    command = [sys.executable, "-m", "tomexport", *SEEDED, "--schedule", "const:8"]
    with subprocess.Popen(
        [*command, "-o", "out.onnx"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not STAGES[stage](process, here) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(delay)
        assert process.poll() is None, "the export ended before the signal"
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
    assert out == ""
    assert "Traceback" not in err
    if sent == signal.SIGINT:
        # a shell shows 130 for both; Python ends by the signal if exec() was interrupted
        assert process.returncode in (130, -signal.SIGINT)
        assert err.split("\n")[-2:] == ["interrupted; nothing was left behind", ""]
    else:
        assert process.returncode not in (0, 1, 2)
    assert listing(here) == {}


def test_plan_of_tokens_counts_no_head_and_spares_nothing(run):
    command = ("plan", "deit_tiny_patch16_224", "--schedule", "none", "--json")
    logits, tokens = (json.loads(run(*command, *o).out) for o in ((), ("--output", "tokens")))
    assert logits["macs"] - tokens["macs"] == 192 * 1000
    assert logits["macs_spared"] > 0 == tokens["macs_spared"]


def test_the_output_is_no_file(run, here):
    refused = run(*SEEDED, "--schedule", "none", "-o", "m.onnx", "--output", "m2.onnx")
    assert "Unknown output 'm2.onnx'; known: features, logits, tokens" in refused.error()
