"""`scalefl serve`: it says what `scalefl predict` says, and its map is the answer's gradient."""

import asyncio
import base64
import io
import json
import re
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from runs import federation, start
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from scalefl.batches import Batcher
from scalefl.cli import main
from scalefl.config.serveoptions import ServeOptions
from scalefl.contracts import Example
from scalefl.inference import ExitRule
from scalefl.models.quantised import QuantisedLinear, quantise
from scalefl.prediction.asked import Asked, load
from scalefl.prediction.calibration import Calibration, write_calibration
from scalefl.serving.explain import explain
from scalefl.serving.guard import Guard
from scalefl.serving.report import overlaid
from scalefl.serving.upload import told

ROUNDING = 2e-6
"""Six decimals are told by `scalefl predict`, of sums in fp32."""
SOFT = ExitRule(thresholds=(2.0,), temperatures=(6.0, 4.0))
"""A sure answer's log-probability is flat; divided by so much the model is not sure."""


@pytest.fixture(scope="module")
def fed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    start(folder, tuning="lora", num_rounds=1)
    return federation(folder, tuning="lora")


@pytest.fixture(scope="module")
def export(fed, tmp_path_factory):
    """A function from options of `scalefl export` to the folder of a level with two exits."""

    def write(*typed):
        out = tmp_path_factory.mktemp("exported") / "model"
        checkpoint = f"{fed.run.save_path}/checkpoints/round-0001"
        assert main(["export", "--checkpoint", checkpoint, "--level", "2", "--out", str(out), *typed]) == 0
        return out

    return write


@pytest.fixture(scope="module")
def model(export):
    return export("--merge_lora")


@pytest.fixture(scope="module")
def images(fed):
    return [fed.data.read_image(example) for example in fed.data.splits["val"]]


def asked(folder, rule=SOFT):
    return Asked(model=load(ServeOptions(model=str(folder))).model, rule=rule, max_new_tokens=3)


def predicted(capsys, tmp_path, folder, image, *typed):
    image.save(tmp_path / "image.png")
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "image.png"), "--json", "--model", str(folder), *typed]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    return record


@pytest.mark.parametrize(
    "options", [{}, {"max_exit": 1}, {"exit_threshold": 0.5}, {"answers": ("mild", "severe")}], ids=str
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_answer_is_that_of_predict(capsys, tmp_path, export, images, options, calibrated):
    folder = export()
    if calibrated:
        found = Calibration(measure="margin", thresholds=(0.1,), temperatures=(3.0, 0.7))
        write_calibration(folder, found)
    typed = [text for k, v in options.items() for text in (f"--{k}", *(v if k == "answers" else [str(v)]))]
    ours = load(ServeOptions(model=str(folder), **options))
    for image in images[:3]:
        record = predicted(capsys, tmp_path, folder, image, *typed)
        explained = explain(ours, image)
        assert (explained.answer.text, explained.answer.exit) == (record["answer"], record["exit"])
        told = {name: record[f"p({name})"] for name in options.get("answers", ours.model.answers)}
        assert explained.answer.probabilities == pytest.approx(told, abs=ROUNDING)
        assert explained.probabilities[record["exit"] - 1] == pytest.approx(told, abs=ROUNDING)


def test_every_exit_tells_its_own_probabilities(capsys, tmp_path, model, images):
    explained = explain(load(ServeOptions(model=str(model))), images[0])
    first = predicted(capsys, tmp_path, model, images[0], "--max_exit", "1")
    assert explained.answer.exit == 2 and len(explained.probabilities) == 2
    expected = {name: first[f"p({name})"] for name in explained.answer.probabilities}
    assert explained.probabilities[0] == pytest.approx(expected, abs=ROUNDING)
    assert explained.probabilities[1] != pytest.approx(expected, abs=1e-3)


def test_a_written_answer_tells_its_first_token(capsys, tmp_path, model, images):
    ours = load(ServeOptions(model=str(model), open=True, max_new_tokens=3))
    explained = explain(ours, images[0])
    record = predicted(capsys, tmp_path, model, images[0], "--open", "--max_new_tokens", "3")
    assert (explained.answer.text, explained.answer.exit) == (record["answer"], record["exit"])
    pixels = {"0": ours.model.prepare(images[0])}
    prompt = Batcher(ours.model.processor, ours.model.asking(["0"]), pixels, torch.device("cpu")).prompts([0])
    for exit, of_exit in enumerate(explained.probabilities, start=1):
        with torch.no_grad():
            value, token = ours.model.model(**prompt, exit=exit).logits[0, -1].softmax(-1).max(-1)
        text = ours.model.processor.tokenizer.decode([int(token)])
        assert of_exit == {text: pytest.approx(float(value), abs=ROUNDING)}
    assert explained.saliency_rc.max() > 0


def log_probability(ours, features_tf, exit, answer):
    """Of an answer among the candidates, in float64, each candidate behind a prompt of its own."""
    found = []
    for text in ours.model.answers:
        example = Example(image_key="0", patient="0", question=ours.model.question, answer=text)
        made = Batcher(ours.model.processor, [example], {}, torch.device("cpu"), features={"0": features_tf})
        batch = made.training([0])
        with torch.no_grad():
            log_probs_nv = ours.model.model(**batch.inputs).exit_logits[exit - 1].log_softmax(-1)
        found.append(log_probs_nv.gather(1, batch.targets[:, None]).sum())
    assert found[0].dtype == torch.float64
    told_a = (torch.stack(found) / ours.rule.temperatures[exit - 1]).log_softmax(-1)
    return float(told_a[ours.model.answers.index(answer)])


@pytest.mark.parametrize("exit", [1, 2])
def test_the_map_is_the_slope_of_the_answer(monkeypatch, model, images, exit):
    """A patch's saliency is how fast the log-probability rises as all that is said of the patch is scaled up:
    differences of fourth order, all in float64 but for the scores, which are summed in fp32.
    """
    double = lambda norm, x: norm.weight * x * (x.pow(2).mean(-1, True) + norm.variance_epsilon).rsqrt()  # noqa: E731
    monkeypatch.setattr(LlamaRMSNorm, "forward", double)  # its own is in fp32 inside
    ours = asked(model, ExitRule(thresholds=(2.0,), temperatures=SOFT.temperatures, max_exit=exit))
    ours.model.model.double()
    explained = explain(ours, images[0])
    assert explained.answer.exit == exit
    pixel_values = ours.model.processor.normalise(ours.model.prepare(images[0])[None])
    with torch.no_grad():
        features_tf = ours.model.model.vision_features(pixel_values)[0]
    step, slopes = 1e-3, []
    for patch in range(16):

        def at(scale, patch=patch):
            scaled_pd = features_tf.reshape(16, -1).clone()
            scaled_pd[patch] *= 1 + scale
            return log_probability(ours, scaled_pd.view_as(features_tf), exit, explained.answer.text)

        slopes.append((8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step))
    assert min(slopes) < 0 < max(slopes)
    expected_rc = torch.tensor(slopes).relu().view(4, 4)
    assert float((explained.saliency_rc - expected_rc).abs().max()) <= 1e-5 * max(slopes)


def test_the_map_is_dark_where_the_model_does_not_look(model, images):
    ours = asked(model)
    projector_d4e = ours.model.model.projector.weight.unflatten(1, (4, -1))
    projector_d4e[:, 1:] = 0  # of four neighbours in a row the first is seen
    saliency_rc = explain(ours, images[0]).saliency_rc
    assert saliency_rc[:, 0].max() > 0 and not saliency_rc[:, 1:].any()
    projector_d4e[:] = 0
    blind = explain(ours, images[0]).saliency_rc
    assert not blind.any()
    shown = images[0].convert("RGB")
    assert np.array_equal(overlaid(shown, blind), shown)


def test_the_map_lies_over_its_patches():
    saliency_rc = torch.zeros(4, 4)
    saliency_rc[0, 3] = 0.01
    grey = Image.new("RGB", (120, 80), (90, 90, 90))
    changed = (np.asarray(overlaid(grey, saliency_rc), dtype=int) != 90).any(-1)
    rows, columns = np.nonzero(changed)
    # Bilinear: it fades out halfway into the neighbours.
    assert changed[0, 119] and rows.max() < 1.5 * 80 / 4 and columns.min() >= 2.5 * 120 / 4


def in_int8(model, family):
    for name, module in list(model.named_modules()):
        if family.is_block_weight(f"{name}.weight"):
            weight = quantise(module.weight.data, "int8", transposed=False, double_quant=False)
            model.set_submodule(name, QuantisedLinear(weight, torch.float32))


@pytest.mark.parametrize(
    ("typed", "quantised", "distance"),
    [
        ((), False, 1e-4),
        (("--merge_lora", "--dtype", "bf16"), False, 0.1),
        (("--merge_lora", "--dtype", "fp16"), False, 0.02),
        (("--merge_lora",), True, 0.1),
    ],
    ids=["lora", "bf16", "fp16", "int8"],
)
def test_other_forms_of_the_model_have_the_same_map(export, model, images, typed, quantised, distance):
    """But for their rounding: 8 bits in bf16, 11 in fp16, 7 in int8, of sums over tens of values."""
    ours = asked(export(*typed))
    if quantised:
        in_int8(ours.model.model, ours.model.family)
    expected_rc = explain(asked(model), images[0]).saliency_rc
    found_rc = explain(ours, images[0]).saliency_rc
    assert found_rc.dtype == torch.float32
    assert float((found_rc - expected_rc).norm() / expected_rc.norm()) <= distance


def test_no_gradient_stays(model, images):
    ours = asked(model)
    once, again = (explain(ours, images[0]).saliency_rc for _ in range(2))
    assert torch.equal(once, again)
    assert all(p.grad is None and not p.requires_grad for p in ours.model.model.parameters())


def png_that_claims(width, height):
    parts = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT" + zlib.compress(b"")]
    chunks = [struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encoded(kind):
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<script>alert(1)</script>", "not an image"),
        (encoded("GIF"), "not an image"),
        (encoded("PNG")[:-900], "corrupt (image file is truncated"),
        (png_that_claims(10_000, 10_000), "claims 10000 x 10000 pixels, more than 80000000"),
        (png_that_claims(2**30, 2**30), "Image size (1152921504606846976 pixels) exceeds limit"),
    ],
    ids=["text", "gif", "truncated", "large", "bomb"],
)
def test_a_file_that_cannot_be_used_gets_one_line_and_goes(tmp_path, model, content, reason):
    path = tmp_path / "patient.png"
    path.write_bytes(content)
    html = told(asked(model), path)
    assert html.startswith(f'<p id="problem" role="alert">the uploaded file: {reason}')
    assert "\n" not in html and "patient" not in html and not path.exists()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
def test_every_kind_of_radiograph_is_told(tmp_path, model, mode):
    path = tmp_path / "patient.png"
    Image.new(mode, (3000, 1)).save(path)
    html = told(asked(model), path)
    assert "patient" not in html and not path.exists()
    for name in ("radiograph", "saliency"):
        (data,) = re.findall(f'id="{name}" alt="[^"]*" src="data:image/png;base64,([^"]*)"', html)
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (640, 1)


def test_a_file_that_is_gone_is_told_in_a_line(tmp_path, model):
    """The same file dropped in two pages is one upload, which the first answer removes."""
    html = told(asked(model), tmp_path / "patient.png")
    assert html.startswith('<p id="problem" role="alert">the uploaded file: ') and "patient" not in html


def test_answers_are_text_and_no_html(tmp_path, model):
    Image.new("L", (40, 40)).save(tmp_path / "image.png")
    ours = load(ServeOptions(model=str(model), answers=("<b>one</b>", "<b>two</b>")))
    html = told(ours, tmp_path / "image.png")
    assert "&lt;b&gt;one&lt;/b&gt;" in html and "<b>one" not in html


def asked_of(guard, method, path, body=b"", **headers):
    """Status of a request, sent in two parts, and what came through to the application."""
    came, sent = [], []
    headers = {"content-length": str(len(body)), **headers}
    scope = {"type": "http", "method": method, "path": path}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
    parts = [{"type": "http.request", "body": body[:9], "more_body": True}]
    parts += [{"type": "http.request", "body": body[9:], "more_body": False}]

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        while (message := await receive()) and came.append(message["body"]) is None and message["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 200})

    guard._app = app
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], b"".join(came)


@pytest.fixture
def guard(tmp_path):
    (tmp_path / "uploads" / "hash").mkdir(parents=True)
    (tmp_path / "uploads" / "hash" / "a.png").write_text("an upload")
    (tmp_path / "other.png").write_text("no upload")
    (tmp_path / "uploads" / "link.png").symlink_to(tmp_path / "other.png")
    return Guard(None, tmp_path / "uploads", max_upload=1000)


def naming(path, **more):
    return json.dumps({"data": [{"path": str(path), **more}], "fn_index": 0}).encode()


def test_an_upload_may_be_asked_about(tmp_path, guard):
    body = naming(tmp_path / "uploads" / "hash" / "a.png", meta={"_type": "gradio.FileData"})
    assert asked_of(guard, "POST", "/gradio_api/queue/join", body) == (200, body)
    assert asked_of(guard, "POST", "/gradio_api/upload", b"some image") == (200, b"some image")
    assert asked_of(guard, "GET", "/config")[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        lambda folder: naming(folder / "other.png"),
        lambda folder: naming(folder / "uploads" / ".." / "other.png"),
        lambda folder: naming(folder / "uploads" / "link.png"),
        lambda folder: naming(folder / "uploads" / "hash"),
        lambda folder: naming(folder / "uploads" / "gone.png"),
        lambda folder: naming(folder / "uploads" / "hash" / "a.png", is_stream=True),
        lambda folder: naming("http://example.com/a.png"),
        lambda folder: naming("\0"),
        lambda folder: json.dumps({"data": ["a.png"]}).encode(),
        lambda folder: json.dumps({"data": []}).encode(),
        lambda folder: json.dumps([1]).encode(),
        lambda folder: b"data",
        lambda folder: b"[" * 60_000,
    ],
)
def test_nothing_else_may_be_asked_about(tmp_path, guard, body):
    assert asked_of(guard, "POST", "/gradio_api/queue/join", body(tmp_path)) == (403, b"")


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/gradio_api/run/predict", {}, 403),
        ("POST", "/gradio_api/call/predict", {}, 403),
        ("PUT", "/gradio_api/upload", {}, 403),
        ("GET", "/gradio_api/file=/etc/hostname", {}, 403),
        ("GET", "/gradio_api/proxy=http://example.com", {}, 403),
        ("POST", "/gradio_api/upload", {"content-length": "1001"}, 413),
        ("POST", "/gradio_api/upload", {"content-length": ""}, 411),
        ("POST", "/gradio_api/queue/join", {"content-length": "65537"}, 413),
    ],
)
def test_other_ways_in_are_closed(guard, method, path, headers, status):
    assert asked_of(guard, method, path, **headers) == (status, b"")


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["--port", "70000"], "--port: got 70000; expected a number from 0 to 65535."),
        (["--max_upload_mb", "0"], "--max_upload_mb: got 0; expected a number at least 1."),
        (["--exit_threshold", "2"], "--exit_threshold: got 2.0; expected a number from 0 to 1."),
    ],
)
def test_bad_options(capsys, model, typed, line):
    assert main(["serve", "--model", str(model), *typed]) == 2
    assert capsys.readouterr().err.splitlines() == [f"scalefl: {line}"]


def test_without_gradio(capsys, monkeypatch, model):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["serve", "--model", str(model)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == ["scalefl: scalefl serve: gradio is not installed; `pip install .[serve]` installs it."]
