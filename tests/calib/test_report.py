"""The page: what it says is what was found, in a real browser, in both lights, on a phone."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import tomexport
from tests import made_up_profile
from tomexport.calib.evaluate import Accuracy, Evaluated, EvaluateReport
from tomexport.calib.fidelity import Estimate, Likeness
from tomexport.calib.images import ImageSet
from tomexport.calib.report.axis import Axis
from tomexport.calib.report.read import Front, Point, Unmerged, read
from tomexport.calib.report.report import report
from tomexport.calib.show import as_pixels, paint
from tomexport.calib.trace import Tracer
from tomexport.cli import main
from tomexport.errors import ArtifactError, ExportError, ImageError
from tomexport.runtime.profile import ProfileReport

NASTY = "a <b>bold \"name\" & 'more'.png"
POINTS = (
    Point("tome", "const:8", "f32", 0.9, 8.0, 0.02, True, 0.03, True),
    Point("tome", "exp:0.25,0", "f32", 0.8, 6.0, 0.05, True),
    Point("evit", "const:8", "int8", 0.7, 7.0, 0.11, False),
)
SECTIONS = ["plan", "patches", "parity", "evaluation", "latency", "operators", "choices"]


def _evaluation(model):
    """An evaluation that nobody made."""
    top1, change = Estimate(0.9125, 0.9, 0.925, 800), Estimate(-0.01, -0.02, 0.0, 800)
    like = Likeness(Estimate(0.95, 0.93, 0.97, 800), None, Estimate(0.99, 0.98, 1.0, 800))
    run = Evaluated(
        "onnxruntime", "CPU", "f32", False, 800, 0, Accuracy(top1, None), Accuracy(change, None),
        like, (),
    )  # fmt: skip
    return EvaluateReport(
        "model.onnx", model, "tome", "const:8", "all 800 of photos", 800, (), "model.none.onnx",
        Accuracy(top1, None), (run,), (),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(seeded, natural_images, tmp_path_factory):
    """A file, images, and what other commands would have written of it."""
    path = tmp_path_factory.mktemp("report")
    tomexport.export(seeded("test_vit"), "const:8", path / "model.onnx", verify=False)
    metadata = tomexport.pipeline.describe(path / "model.onnx")
    timed = dataclasses.replace(made_up_profile.report(), model=metadata.plan.model)
    (path / "profile.json").write_text(json.dumps(timed.to_dict()))
    front = Front(metadata.plan.model, POINTS, "1 − top-1", Unmerged(10.0))
    (path / "front.json").write_text(json.dumps(dataclasses.asdict(front)))
    (path / "evaluation.json").write_text(json.dumps(_evaluation(front.model).to_dict()))
    (path / "photos").mkdir()
    for name, image in zip((NASTY, "b.png"), natural_images(160), strict=False):
        pixels = ((image.transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)
        Image.fromarray(pixels).save(path / "photos" / name)
    return path


@pytest.fixture(scope="module")
def page(folder):
    """The page of it."""
    images = ImageSet.find(folder / "photos")
    written = report(
        folder / "model.onnx", folder / "report.html", images=images,
        profile=folder / "profile.json", front=folder / "front.json",
        evaluation=folder / "evaluation.json",
    )  # fmt: skip
    assert written.passed
    assert written.images == 2
    assert written.size == (folder / "report.html").stat().st_size
    return folder / "report.html"


# --- in a browser


@pytest.fixture(scope="module")
def browser(lacking):
    """The Chromium of this machine."""
    path = shutil.which("chromium")
    if path is None:
        lacking("Chromium", "apt install chromium", "TOMEXPORT_REQUIRE_BROWSER")
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, page):
    """Open the page in a window; what it complains of fails the test."""
    contexts, complaints, requests = [], [], []

    def open_it(width=1100, height=900, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        contexts.append(context)
        window = context.new_page()
        window.on("console", lambda message: complaints.append(message.text))
        window.on("pageerror", lambda error: complaints.append(str(error)))
        window.on("request", lambda request: requests.append(request.url))
        window.goto(page.as_uri())
        return window

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in requests) == len(contexts)


def test_every_figure_is_there(opened):
    window = opened()
    assert [section.get_attribute("id") for section in window.query_selector_all("section")] == (
        SECTIONS
    )
    assert window.locator("#plan g[data-tip]").count() == 6
    assert window.locator("#latency circle").count() == 3
    assert window.locator("#choices circle[data-tip]").count() == len(POINTS) + 1
    assert window.locator("#choices .ring").count() == 1
    assert window.locator("#choices .stairs").count() == 2
    sizes = window.evaluate("[...document.images].map(i => [i.naturalWidth, i.clientWidth, i.alt])")
    assert len(sizes) == 2 * 5, "each image, and four layers"
    assert all(natural >= 160 and shown > 50 and alt for natural, shown, alt in sizes)
    for svg in window.query_selector_all("svg"):
        box = svg.bounding_box()
        assert box["width"] > 300
        assert box["height"] > 100


def test_marks_stand_where_their_values_are(opened):
    window = opened()
    marks = window.query_selector_all("#choices circle[data-tip]")
    slow, quick, other, unmerged = (mark.bounding_box() for mark in marks)
    centre = {
        name: (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        for name, box in zip("sqou", (slow, quick, other, unmerged), strict=True)
    }
    one_ms = (centre["s"][0] - centre["q"][0]) / 2
    assert centre["u"][0] - centre["s"][0] == pytest.approx(2 * one_ms, abs=1)
    assert centre["o"][0] - centre["q"][0] == pytest.approx(one_ms, abs=1)
    one_percent = (centre["s"][1] - centre["q"][1]) / 3
    assert centre["u"][1] - centre["s"][1] == pytest.approx(2 * one_percent, abs=1)
    assert centre["q"][1] - centre["o"][1] == pytest.approx(6 * one_percent, abs=1)


def test_pointing_at_a_mark_says_its_values(opened):
    window = opened()
    tip = window.locator("#tip")
    assert not tip.is_visible()
    window.locator("#choices circle[data-tip]").nth(2).hover()
    assert tip.inner_text() == ("const:8\nevit, int8\n7.00 ms, 0.700 GMACs\nloss 11.00%")
    window.locator("#latency circle").first.hover()
    assert tip.inner_text() == "fused\nmedian 8.00 ms\np20 7.60, p90 9.60, p99 16.00 ms\n100 calls"
    box = tip.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 1100
    window.locator("h1").hover()
    assert not tip.is_visible()


def test_the_keyboard_reaches_what_matters(opened):
    window = opened()
    tip = window.locator("#tip")
    window.locator("#choices circle[data-tip]").nth(0).focus()
    assert tip.inner_text().startswith("const:8\ntome, f32\n8.00 ms, 0.900 GMACs\nloss 2.00%, held")
    window.keyboard.press("Tab")
    assert tip.inner_text().startswith("exp:0.25,0")
    window.keyboard.press("Escape")
    assert not tip.is_visible()
    focusable = window.locator("#choices circle[tabindex]").count()
    assert focusable == 2, "those on the front"
    unnamed = window.evaluate(
        "[...document.querySelectorAll('[tabindex]')].filter(e => !e.ariaLabel).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize("width", [360, 1100])
def test_no_page_is_wider_than_its_window(opened, width):
    window = opened(width=width, height=800)
    assert window.evaluate("document.documentElement.scrollWidth") == width
    window.locator("#choices circle[data-tip]").last.hover()
    assert window.evaluate("document.documentElement.scrollWidth") == width
    box = window.locator("#tip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    outside = window.evaluate(
        """[...document.querySelectorAll("h1, h2, h3, p, figcaption, dd, img, svg text")]
           .filter(e => !e.closest(".wide"))
           .filter(e => e.getBoundingClientRect().right > innerWidth + 1
                     || e.getBoundingClientRect().left < -1)
           .map(e => e.textContent)"""
    )
    assert outside == []


def _contrast(one, other):
    """WCAG 2's contrast of two colours, (r, g, b) from 0 to 255."""
    light = []
    for colour in (one, other):
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (channel / 255 for channel in colour)
        ]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_both_lights(opened, scheme):
    window = opened(scheme=scheme)
    colour = "e => getComputedStyle(e)[e.tagName === 'text' ? 'fill' : '{}']"

    def rgb(selector, what="color"):
        text = window.locator(selector).first.evaluate(colour.replace("{}", what))
        return tuple(map(int, re.findall(r"\d+", text)[:3]))

    paper = rgb("body", "backgroundColor")
    assert (sum(paper) > 600) == (scheme == "light")
    texts = ("h1", "p", "figcaption", ".axis", "svg text", ".good", "thead th", "footer dd")
    for selector in texts:
        assert _contrast(rgb(selector), paper) >= 4.5, selector
    shot = np.asarray(Image.open(io.BytesIO(window.screenshot(full_page=True))).convert("RGB"))
    assert (np.abs(shot.astype(int) - paper).max(axis=2) > 40).mean() > 0.03, "it is not blank"
    assert shot.std() > 10


# --- without one


def test_accuracy_is_there_with_its_intervals(page):
    section = page.read_text().split('<section id="evaluation">')[1].split("</section>")[0]
    for said in ("91.2 % (90.0–92.5)", "-1.0 % (-2.0–0.0)", "95.0 % (93.0–97.0)", "0.9900"):
        assert said in section, said


def test_it_needs_nothing_else_and_escapes_names(page):
    text = page.read_text()
    assert "<b>bold" not in text
    assert "a &lt;b&gt;bold &#34;name&#34; &amp; &#39;more&#39;.png" in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "default-src 'none'" in text
    assert text.count("<script") == 1


def test_pictures_on_it_are_those_of_show(page, folder):
    sources = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', page.read_text())
    tracer = Tracer.load(folder / "model.onnx")
    prepared = ImageSet.find(folder / "photos")(tracer.metadata)[0][0]
    pixels = as_pixels(prepared, tracer.metadata)
    painted = [paint(pixels, frame.groups, 240).astype(int) for frame in tracer(prepared)[:5]]
    for source, layer in zip(sources[1:5], (0, 1, 2, 4), strict=True):
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(source))))
        apart = [np.abs(found - each).mean() for each in painted]
        assert np.argmin(apart) == layer


def test_what_is_not_given_is_found_out(folder, tmp_path, capsys):
    out = tmp_path / "report.html"
    command = ["report", str(folder / "model.onnx"), "-o", str(out), "--seconds", "0.5"]
    assert main([*command, "--threads", "1", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["passed"], said["images"], said["path"]) == (True, 2, str(out))
    text = out.read_text()
    assert "golden image 0" in text
    assert "Time and arithmetic" in text
    assert "there is no model.none.onnx beside the file" in text
    assert main(command) == 2
    assert "exists already; --force replaces it" in capsys.readouterr().err


def test_a_file_that_is_wrong_says_so(folder, tmp_path, capsys, monkeypatch):
    import onnx
    from onnx import numpy_helper

    model = onnx.load(folder / "model.onnx")
    head = next(w for w in model.graph.initializer if list(w.dims) in ([64, 1000], [1000, 64]))
    head.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(head) + 1, head.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    command = ["report", str(tmp_path / "wrong.onnx"), "-o", str(tmp_path / "wrong.html")]
    assert main([*command, "--profile", str(folder / "profile.json")]) == 1
    assert "does NOT compute what PyTorch computes" in capsys.readouterr().out
    assert '<span class="bad">fail</span>' in (tmp_path / "wrong.html").read_text()


def test_a_file_that_chooses_nothing_has_a_page_too(seeded, folder, tmp_path):
    tomexport.export(seeded("test_vit"), "none", tmp_path / "none.onnx", verify=False)
    timed = json.loads((folder / "profile.json").read_text()) | {"schedule": "none"}
    (tmp_path / "profile.json").write_text(json.dumps(timed))
    written = report(
        tmp_path / "none.onnx", tmp_path / "none.html", profile=tmp_path / "profile.json"
    )
    assert written.images == 0
    assert "has no choice of tokens to show: tome with none" in (tmp_path / "none.html").read_text()


def test_what_other_commands_wrote_comes_back_as_it_was(folder):
    found = read(folder / "profile.json", ProfileReport, "profile")
    assert found == dataclasses.replace(made_up_profile.report(), model=found.model)
    front = read(folder / "front.json", Front, "search")
    assert front.points == POINTS
    found = read(folder / "evaluation.json", EvaluateReport, "evaluate")
    assert found == _evaluation(front.model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.pop("runs"), "no 'runs'"),
        (lambda data: data.update(runs="none"), "'none' where a list belongs"),
        (lambda data: data["runs"][0].update(batch="1"), "'1' where a int belongs"),
        (lambda data: data["runs"][0]["variants"][0].update(median_ms=float("nan")), "nan where"),
        (lambda data: data["runs"][0].update(variants=[3]), "3 where a dict belongs"),
        (lambda data: data["runs"][0]["variants"][0].pop("name"), "no 'name'"),
        (lambda data: data.update(passed=None, machine=[]), "[] where a dict belongs"),
        (lambda data: data.update(schedule="const:9"), "its schedule is const:9, and const:8 is"),
        (lambda data: data.update(model="other"), "of another file: its model is other"),
        (lambda data: data.update(runs=[]), "holds no run, so there is no latency"),
        (lambda data: data["runs"][0].update(variants=[]), "holds no run, so there is no latency"),
        (lambda data: data["runs"][0].update(predicted_speedup=10**400), "int too large"),
    ],
)
def test_profiles_that_do_not_fit_are_refused(folder, tmp_path, change, said):
    data = json.loads((folder / "profile.json").read_text())
    change(data)
    (tmp_path / "other.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=re.escape(said)):
        report(folder / "model.onnx", tmp_path / "r.html", profile=tmp_path / "other.json")
    assert os.listdir(tmp_path) == ["other.json"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'{"points": 3}', b"[" * 99999])
def test_what_is_no_front_is_refused(folder, tmp_path, content):
    (tmp_path / "front.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="is not what tomexport search MODEL --json writes"):
        report(folder / "model.onnx", tmp_path / "r.html", front=tmp_path / "front.json")


def test_what_cannot_be_written_or_read_is_refused(folder, tmp_path):
    with pytest.raises(ExportError, match=r"a report is a \.html, not '\.pdf'"):
        report(folder / "model.onnx", tmp_path / "r.pdf")
    with pytest.raises(ArtifactError, match=r"gone\.json is not what .* \(No such file"):
        report(folder / "model.onnx", tmp_path / "r.html", profile=tmp_path / "gone.json")
    (tmp_path / "front.json").write_text('{"model": "m", "points": [], "loss": "l"}')
    data = json.loads((folder / "front.json").read_text())
    (tmp_path / "front.json").write_text(json.dumps(data | {"points": []}))
    with pytest.raises(ArtifactError, match="holds no point, so there is no front"):
        report(folder / "model.onnx", tmp_path / "r.html", front=tmp_path / "front.json")
    data = json.loads((folder / "evaluation.json").read_text())
    (tmp_path / "evaluation.json").write_text(json.dumps(data | {"runs": []}))
    with pytest.raises(ArtifactError, match="holds no run, so there is no accuracy"):
        report(folder / "model.onnx", tmp_path / "r.html", evaluation=tmp_path / "evaluation.json")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="could be read"):
        report(
            folder / "model.onnx", tmp_path / "r.html", profile=folder / "profile.json",
            images=ImageSet.find(tmp_path / "photos"),
        )  # fmt: skip
    assert not (tmp_path / "r.html").exists()


# --- axes


@pytest.mark.parametrize(
    ("values", "zero", "marks"),
    [
        ([8.0, 9.6, 16.0], True, ["0", "5", "10", "15", "20"]),
        ([0.02, 0.11], True, ["0.000", "0.025", "0.050", "0.075", "0.100", "0.125"]),
        ([-0.01, 0.03], True, ["-0.01", "0.00", "0.01", "0.02", "0.03"]),
        ([6.0, 10.0], False, ["6", "7", "8", "9", "10"]),
        ([3.0, 3.0], False, ["2.4", "2.6", "2.8", "3.0", "3.2", "3.4", "3.6"]),
        ([0.0], True, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([1234.0], True, ["0", "250", "500", "750", "1000", "1250"]),
    ],
)
def test_axes_have_round_marks_and_hold_all_values(values, zero, marks):
    axis = Axis.over(values, zero=zero)
    assert [text for _, text in axis.marks] == marks
    assert all(0 <= axis.at(value) <= 100 for value in values)
    assert [at for at, _ in axis.marks][:: len(marks) - 1] == [0, 100]
    assert all(axis.at(float(text)) == pytest.approx(at, abs=0.01) for at, text in axis.marks)
