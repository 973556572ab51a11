"""Runs from a reordered base: they go on as from any other, and what leaves them is in its own order."""

import json
import shutil

import pytest
import torch
from reordered import TARGETS, refused, reorder, same_order, saved, tensors
from runs import federation, forget_launch, load_latest, same_bits, start, state
from transformers import LlamaConfig, LlamaForCausalLM

from scalefl.cli import main
from scalefl.models.files import TensorFiles, saved_order
from scalefl.models.minigptv2 import MiniGPTv2ForConditionalGeneration

LORA = {"tuning": "lora", "lora_alpha": 8.0, "lora_targets": list(TARGETS)}
LEVELS = {"vertical_scale_ratios": [0.5, 1.0], "horizontal_scale_ratios": [1, 3], "ee_locs": [1, 2]}
LEVELS |= {"client_split_ratios": [0.5, 0.5], "num_rounds": 1, "lr": 0.05, "optimizer": "sgd"}

ROUNDING = 1e-4
"""Of fp32: sums in another order, where one rounding is 6e-8 and logits are about 10."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model folder and its reordered copy."""
    folder = tmp_path_factory.mktemp("pair")
    base = saved(folder / "base")
    return base, reorder(base, folder / "reordered")


def trained(folder, base, **options):
    folder.mkdir(exist_ok=True)
    return start(folder, "--init_from", str(base), **{**LEVELS, **LORA, **options})


def export(run_folder, out, *typed):
    checkpoint = run_folder / "checkpoints" / "round-0001"
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(out), *typed]) == 0
    return out


@pytest.mark.parametrize("how", ["lora", "chained", "full"])
def test_export_puts_everything_back(tmp_path, pair, how):
    """Nothing was learned at a rate of 0: weights and adapters are those of before, bit for bit."""
    base, reordered = pair
    if how == "full":
        base = saved(tmp_path / "base", adapters=False)
        reordered = reorder(base, tmp_path / "reordered")
    options = {"lr": 0.0, "tuning": "full" if how == "full" else "lora"}
    run_folder = trained(tmp_path / "one", reordered, **options)
    if how == "chained":
        first = run_folder / "checkpoints" / "round-0001"
        run_folder = trained(tmp_path / "two", first, **options)
    out = export(run_folder, tmp_path / "out")
    assert same_bits(tensors(out), tensors(base))
    assert not same_bits(tensors(out), tensors(reordered))
    assert not (out / "order.safetensors").exists()


def test_a_resumed_run_keeps_the_order(tmp_path, pair):
    base, reordered = pair
    run_folder = trained(tmp_path, reordered, lr=0.0)
    forget_launch()
    assert main(["train", "--resume", str(run_folder), "--num_rounds", "2"]) == 0
    order = saved_order(run_folder / "checkpoints" / "round-0002")
    assert order and same_order(order, saved_order(reordered))


def embeds_and_logits(model, inputs):
    with torch.no_grad():
        images = inputs.get("pixel_values"), inputs.get("image_features")
        embeds = model.input_embeds(inputs["input_ids"], *images)
        return embeds, model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits


def test_the_adapter_fits_the_llama_as_it_was(tmp_path, pair):
    """On its own weights, in their own order; on the reordered ones it would say something else."""
    from peft import PeftModel

    base, reordered = pair
    run_folder = trained(tmp_path, reordered)
    folder = export(run_folder, tmp_path / "adapter", "--part", "adapter")
    fed = federation(tmp_path, **{**LEVELS, **LORA, "init_from": str(reordered)})
    ours = fed.store.submodel(2, state(run_folder, 1), own=False).eval()
    inputs = fed.batchers["val"].prompts([0, 1])
    embeds, expected = embeds_and_logits(ours, inputs)
    real, apart = inputs["attention_mask"].bool(), {}
    for name, source in (("base", base), ("reordered", reordered)):
        text = ours.config.text_config.to_dict()
        plain = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in text.items() if k != "model_type"})).eval()
        files, prefix = TensorFiles(source), "language_model."
        plain.load_state_dict({n.removeprefix(prefix): files[n] for n in files if n.startswith(prefix)})
        peft = PeftModel.from_pretrained(plain, folder).eval()
        with torch.no_grad():
            got = peft(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
        apart[name] = float((got - expected)[real].abs().max())
    assert apart["base"] <= ROUNDING and apart["reordered"] > 100 * ROUNDING


@pytest.mark.parametrize("merged", [False, True])
def test_a_cut_level_is_what_its_clients_trained(tmp_path, pair, merged):
    base, reordered = pair
    run_folder = trained(tmp_path, reordered)
    typed = ["--level", "1", *(["--merge_lora"] if merged else [])]
    loaded = MiniGPTv2ForConditionalGeneration.from_pretrained(export(run_folder, tmp_path / "out", *typed))
    fed = federation(tmp_path, **{**LEVELS, **LORA, "init_from": str(reordered)})
    ours = fed.store.submodel(1, state(run_folder, 1), own=False).eval()
    embeds, expected = embeds_and_logits(ours, fed.batchers["val"].prompts([0, 1]))
    mask = fed.batchers["val"].prompts([0, 1])["attention_mask"]
    with torch.no_grad():
        got = loaded.eval()(inputs_embeds=embeds, attention_mask=mask).logits
    assert float((got - expected).abs().max()) <= ROUNDING
    up = "language_model.model.layers.0.mlp.up_proj.weight"
    kept = sorted(saved_order(reordered)["language_model.model.layers.0/ffn"][:20].tolist())
    if not merged:
        assert torch.equal(tensors(tmp_path / "out")[up], TensorFiles(base)[up][kept])


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_reordered_base_is_quantised(tmp_path, quantization):
    base = saved(tmp_path / "base", hidden=64, ffn=64, adapters=False)
    run_folder = trained(
        tmp_path / "run", reorder(base, tmp_path / "new"), quantization=quantization, lora_targets=["q_proj"]
    )
    assert load_latest(run_folder / "checkpoints").round == 1


@pytest.mark.slow
def test_jobs_start_from_a_reordered_base(tmp_path, pair):
    """Clients in processes of their own read the same folder."""
    _, reordered = pair
    here = trained(tmp_path / "here", reordered, num_clients=2)
    jobs = trained(tmp_path / "jobs", reordered, num_clients=2, executor="jobs")
    assert same_bits(state(here, 1), state(jobs, 1))
    assert same_order(saved_order(jobs / "checkpoints" / "round-0001"), saved_order(reordered))


def test_a_base_that_is_gone_or_another(tmp_path, capsys, pair):
    """The checkpoint keeps the order; of the base it needs the weights, in the order they were trained in."""
    base, reordered = pair
    moved = tmp_path / "moved"
    shutil.copytree(reordered, moved)
    checkpoint = trained(tmp_path / "run", moved, lr=0.0) / "checkpoints" / "round-0001"
    (moved / "order.safetensors").unlink()
    command = ["export", "--checkpoint", checkpoint, "--out", tmp_path / "out"]
    line = refused(capsys, *command, "--init_from", base)
    assert line.startswith(f"{checkpoint}: was trained on other weights than {base} holds now;")
    assert main([str(word) for word in command]) == 0
    assert same_bits(tensors(tmp_path / "out"), tensors(base))
    shutil.rmtree(moved)
    shutil.rmtree(tmp_path / "out")
    assert refused(capsys, *command).startswith(f"--init_from {moved}: no model there; expected a folder")


def test_what_is_known_of_a_model_stays_with_it(tmp_path):
    """Of an exported one: what it is asked, when its exits are sure enough, its card."""
    run_folder = start(tmp_path, num_rounds=1, num_patients=60)
    model = export(run_folder, tmp_path / "model")
    data = ["--data", "synthetic", "--num_patients", "60"]
    assert main(["calibrate", "--model", str(model), *data]) == 0
    new = reorder(model, tmp_path / "new")
    for name in ("task.json", "calibration.json"):
        assert json.loads((new / name).read_text()) == json.loads((model / name).read_text())
    assert (new / "README.md").read_bytes() == (model / "README.md").read_bytes()
