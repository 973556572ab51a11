"""An exported level is the sub-model that clients trained, for whoever loads it with plain tools."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import MODEL, Job, environment, federation, load_latest, start
from transformers import LlamaConfig, LlamaForCausalLM

from scalefl.cli import main
from scalefl.models.minigptv2 import MiniGPTv2ForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]

ROUNDING = 2e-5
"""Merged and folded weights: products of fp32 in another order, for logits of about 1."""

LEVELS = {"vertical_scale_ratios": [0.5, 1.0], "horizontal_scale_ratios": [1, 2], "ee_locs": [1]}
LEVELS |= {"client_split_ratios": [0.5, 0.5], "num_rounds": 1, "lr": 0.05, "optimizer": "sgd"}
WIDE = {"text": {**MODEL["text"], "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}}
SPREAD = {"lora_targets": ["q_proj", "v_proj", "o_proj", "down_proj"]}
KINDS = {
    "lora": {"tuning": "lora", **SPREAD},
    "lora, the paper's recipe": {"tuning": "lora", **SPREAD, "recipe": "paper"},
    "full, three heads of four": {"tuning": "full", "vertical_scale_ratios": [0.75, 1.0]},
    "full, the paper's recipe": {"tuning": "full", "recipe": "paper"},
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def trained(request, tmp_path_factory):
    """A run's checkpoint, and what it is built of."""
    return run(tmp_path_factory.mktemp("run"), **request.param)


def run(folder, **options):
    options = {**LEVELS, **options}
    started = start(folder, model=WIDE, **options)
    return started / "checkpoints" / "round-0001", federation(folder, WIDE, **options)


def export(checkpoint, out, *typed):
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(out), *typed]) == 0
    return out


def inputs_of(fed):
    return fed.batchers["val"].prompts([0, 1])


def with_pixels(fed):
    """The same prompts with images in place of what a frozen tower said of them."""
    examples = fed.data.splits["val"][:2]
    images = torch.stack([fed.processor.resize(fed.data.read_image(e)) for e in examples])
    text = {n: t for n, t in inputs_of(fed).items() if n not in ("pixel_values", "image_features")}
    return {**text, "pixel_values": fed.processor.normalise(images.expand(-1, 3, -1, -1))}


def sub_model(fed, checkpoint, level):
    state = load_latest(checkpoint.parent).state
    return fed.store.submodel(level, state, own=False).eval()


def embeds_and_logits(model, inputs):
    with torch.no_grad():
        embeds = model.input_embeds(
            inputs["input_ids"], inputs.get("pixel_values"), inputs.get("image_features")
        )
        return embeds, model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("level", [1, 2])
def test_every_exit_of_a_level(tmp_path, trained, level, merged):
    checkpoint, fed = trained
    typed = ["--level", str(level), *(["--merge_lora"] if merged else [])]
    folder = export(checkpoint, tmp_path / "out", *typed)
    model = MiniGPTv2ForConditionalGeneration.from_pretrained(folder).eval()
    has_adapters = any("lora" in name for name, _ in model.named_parameters())
    assert has_adapters == (fed.run.tuning == "lora" and not merged)
    ours, inputs = sub_model(fed, checkpoint, level), with_pixels(fed)
    with torch.no_grad():
        for exit in range(1, level + 1):
            expected = ours(**inputs_of(fed), exit=exit).logits
            got = model(**inputs, exit=exit).logits
            assert float((got - expected).abs().max()) <= ROUNDING
        other = ours(**inputs_of(fed), exit=1).logits
    assert level == 1 or float((other - expected).abs().max()) > 100 * ROUNDING


PLAIN = """
import sys

class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "scalefl":
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM

folder, given, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
content = torch.load(given)
with torch.no_grad():
    logits = model(inputs_embeds=content["embeds"], attention_mask=content["mask"]).logits
assert not any(name.partition(".")[0] == "scalefl" for name in sys.modules)
torch.save({"logits": logits, "kind": type(model).__name__}, out)
"""


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("level", [1, 2])
def test_the_language_model_in_plain_transformers(tmp_path, trained, level, merged):
    """In a process that cannot import this project: equal logits on equal embeddings.

    A Llama, or where its heads do not divide the hidden size a Mistral.
    """
    checkpoint, fed = trained
    typed = ["--level", str(level), "--part", "language", *(["--merge_lora"] if merged else [])]
    folder = export(checkpoint, tmp_path / "out", *typed)
    inputs = inputs_of(fed)
    embeds, expected = embeds_and_logits(sub_model(fed, checkpoint, level), inputs)
    torch.save({"embeds": embeds, "mask": inputs["attention_mask"]}, tmp_path / "in.pt")
    command = [sys.executable, "-c", PLAIN, str(folder), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found, real = torch.load(tmp_path / "out.pt"), inputs["attention_mask"].bool()
    assert float((found["logits"] - expected)[real].abs().max()) <= ROUNDING
    config = json.loads((folder / "config.json").read_text())
    divides = config["hidden_size"] % config["num_attention_heads"] == 0
    assert found["kind"] == ("LlamaForCausalLM" if divides else "MistralForCausalLM")
    assert divides or config["sliding_window"] is None


def test_the_adapter_on_a_plain_llama(tmp_path):
    from peft import PeftModel

    checkpoint, fed = run(tmp_path, **KINDS["lora"])
    folder = export(checkpoint, tmp_path / "out", "--part", "adapter")
    ours, inputs = sub_model(fed, checkpoint, 2), inputs_of(fed)
    embeds, expected = embeds_and_logits(ours, inputs)
    text = ours.config.text_config.to_dict()
    plain = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in text.items() if k != "model_type"})).eval()
    weights = {
        name.removeprefix("language_model.").replace(".base_layer.", "."): tensor
        for name, tensor in ours.state_dict().items()
        if name.startswith("language_model.") and "lora_" not in name
    }
    plain.load_state_dict(weights)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        before = plain(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
        peft = PeftModel.from_pretrained(plain, folder).eval()
        got = peft(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    assert float((got - expected)[real].abs().max()) <= ROUNDING
    assert float((before - expected)[real].abs().max()) > 10 * ROUNDING


def test_the_whole_model_and_its_card(tmp_path, trained):
    checkpoint, fed = trained
    folder = export(checkpoint, tmp_path / "out", "--dtype", "bf16")
    model = MiniGPTv2ForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.config.exit_layers == [1, 2]
    text = (folder / "README.md").read_text()
    assert text.startswith("# The whole model of a model trained with ScaleFL")
    assert "no medical device" in text and "| level 2 | 2 |" in text
    layers = "2 layers, 4 heads, 48 feed-forward channels, exits after layers 1, 2;"
    widths = " ".join(f"{ratio:g}" for ratio in fed.run.vertical_scale_ratios)
    for told in (
        layers,
        f'- data: synthetic, asked "{fed.run.question}"',
        f"- 1 of 1 federated rounds, 4 clients, --tuning {fed.run.tuning}, ",
        f"- levels: widths {widths}, exits 1 2",
        "- frozen base: none, or random weights\n",
        "Llama 2 Community License",
    ):
        assert told in text
    evaluation = json.loads((checkpoint.parents[1] / "metrics.jsonl").read_text())["evaluation"]
    for level, exits in evaluation["levels"].items():
        for exit, metrics in enumerate(exits, start=1):
            row = next(r for r in text.splitlines() if r.startswith(f"| level {level} | {exit} |"))
            assert f" {metrics['accuracy']:.3f} " in row


def test_a_card_names_its_part_and_no_folder(tmp_path):
    """Of a run from a saved model: where that lies is nobody's business."""
    checkpoint, _ = run(tmp_path, tuning="full")
    base = export(checkpoint, tmp_path / "a base")
    (tmp_path / "lora").mkdir()
    adapted, _ = run(tmp_path / "lora", **KINDS["lora"], init_from=str(base))
    for part, title in (("adapter", "The LoRA adapter of the"), ("language", "The language model of the")):
        text = (export(adapted, tmp_path / part, "--part", part) / "README.md").read_text()
        assert text.startswith(f"# {title} whole model of a model trained with ScaleFL")
        assert "- frozen base: a base\n" in text and str(tmp_path) not in text


def test_weights_may_be_read_by_who_may_read_the_rest(tmp_path, trained):
    folder = export(trained[0], tmp_path / "out")
    assert len({path.stat().st_mode for path in [*folder.iterdir(), *trained[0].iterdir()]}) == 1


def test_a_signal_leaves_nothing(tmp_path, trained):
    """Neither beside --out nor among temporary files; and says so in a line."""
    (tmp_path / "tmp").mkdir()
    slow = "import time; from scalefl.export import command as c; w = c.WRITERS['whole']; "
    slow += "c.WRITERS['whole'] = lambda *a: (w(*a), print('written', flush=True), time.sleep(60)); "
    slow += "import sys; from scalefl.cli import main; sys.exit(main(sys.argv[1:]))"
    typed = ["export", "--checkpoint", str(trained[0]), "--out", str(tmp_path / "out")]
    with Job(tmp_path, ["-c", slow, *typed], TMPDIR=str(tmp_path / "tmp"), PYTHONPATH=str(ROOT)) as job:
        job.wait_for("written")
        os.kill(job.process.pid, signal.SIGTERM)
        assert job.end(30) == 143
    assert "scalefl: stopped outside of training; nothing is lost, start again." in job.output
    left = {path.name for path in tmp_path.rglob("*")} - {"output.txt", "tmp"}
    assert {name for name in left if "out" in name or "base" in name} == set()


FRESH = """
import sys, scalefl
assert "torch" not in sys.modules
model = scalefl.MiniGPTv2ForConditionalGeneration.from_pretrained(sys.argv[1])
print(model.config.exit_layers, type(scalefl.MiniGPTv2Processor.from_pretrained(sys.argv[1])).__name__)
"""


def test_import_scalefl_is_enough(tmp_path, trained):
    """And costs no import of torch until a class is asked for."""
    folder = export(trained[0], tmp_path / "out", "--level", "1")
    command = [sys.executable, "-c", FRESH, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.stdout == "[1] MiniGPTv2Processor\n", done.stderr


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["--level", "7"], "--level 7: no level of this run; expected one of (1, 2)."),
        (["--part", "adapter", "--level", "1"], "--part adapter: is the whole model's LoRA as it is"),
        (["--checkpoint", "nowhere"], "nowhere/run.json: No such file or directory"),
        (["--part", "words"], "--part: got 'words'; expected one of whole, language, adapter."),
    ],
)
def test_what_cannot_be_exported(tmp_path, trained, capsys, typed, line):
    checkpoint, _ = trained
    command = ["export", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), *typed]
    assert main(command) == 2
    (said,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("scalefl:")]
    assert line in said
    assert list(tmp_path.iterdir()) == []
