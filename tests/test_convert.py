"""Released files become a model that gives upstream's own numbers; nothing is skipped silently."""

import json
import os
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from runs import federation, forget_launch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from scalefl.cli import main
from scalefl.config.convertoptions import ConvertOptions
from scalefl.conversion.minigptv2 import Released
from scalefl.conversion.sources import Source
from scalefl.models.minigptv2 import MiniGPTv2ForConditionalGeneration, MiniGPTv2Processor

FIXTURE = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "minigptv2-tiny"
CLOSE = {"rtol": 0.0, "atol": 1e-4}
"""Two versions of transformers, fp32, values up to 10."""
SIZES = {"--image_size": "56", "--vit_heads": "4", "--lora_alpha": "8"}
"""What the fixture's files do not tell."""

IN_CI = os.environ.get("CI") == "true"
pytestmark = pytest.mark.skipif(
    not FIXTURE.is_dir() and not IN_CI, reason=f"no numbers of upstream's code at {FIXTURE}"
)
"""In CI they must be there: without them these tests fail."""


def typed(out, changed=None, **options):
    """The command line; `changed` are other values of its flags."""
    flags = {
        "--llama": str(FIXTURE / "llama"),
        "--vit": str(FIXTURE / "eva_vit.pth"),
        "--ckpt": str(FIXTURE / "minigptv2.pth"),
        "--out": str(out),
        **SIZES,
        **(changed or {}),
    }
    return ["convert", *(word for pair in flags.items() for word in pair), *options.get("more", ())]


def converted(out, changed=None):
    assert main(typed(out, changed)) == 0
    return out


def load(folder, **options):
    model = MiniGPTv2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("converted") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return MiniGPTv2Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURE / "expected.safetensors")


@pytest.fixture(scope="module")
def texts():
    return json.loads((FIXTURE / "expected_text.json").read_text())


def padded(rows, pad, *, left=False):
    """Rows to one length, and their mask."""
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]
    fill = [([pad] * gap, [0] * gap) for gap in gaps]
    ids = [gap + row if left else row + gap for row, (gap, _) in zip(rows, fill, strict=True)]
    mask = [
        gap + [1] * len(row) if left else [1] * len(row) + gap
        for row, (_, gap) in zip(rows, fill, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def prompts(processor, texts):
    return [
        (processor.encode_text(processor.prompt_template.format(question)), processor.encode_answer(answer))
        for question, answer in zip(texts["instruction"], texts["answer"], strict=True)
    ]


@pytest.mark.parametrize("prefix", ["", "interp_"])
def test_upstreams_numbers(tmp_path, folder, expected, texts, prefix):
    """Token ids, positions, tower, image tokens, embeddings, logits, loss per batch and row, gradients."""
    if prefix:
        folder = converted(tmp_path / "model", {"--image_size": "84"})
        positions = load(folder).vision_model.embeddings.position_embedding
        torch.testing.assert_close(positions, expected["interp_pos_embed"], **CLOSE)
    model, processor = load(folder), MiniGPTv2Processor.from_pretrained(folder)
    expected = {name.removeprefix(prefix): t for name, t in expected.items() if name.startswith(prefix)}
    rows = prompts(processor, texts)
    ids, mask = padded([[*prompt, *answer] for prompt, answer in rows], processor.tokenizer.pad_token_id)
    image_token = processor.image_token_id
    assert torch.equal(ids, expected["input_ids"].masked_fill(expected["input_ids"] == -200, image_token))
    assert torch.equal(mask, expected["attention_mask"])
    image = expected["image"]
    with torch.no_grad():
        tower = model.vision_model
        vit = tower.encoder(inputs_embeds=tower.embeddings(image)).last_hidden_state
        torch.testing.assert_close(vit, expected["vit_out"], **CLOSE)  # before ln_vision
        found = model.image_embeds(model.vision_features(image))
        torch.testing.assert_close(found, expected["image_embeds"], **CLOSE)
        embeds = model.input_embeds(ids, image)
    real = mask.bool()
    torch.testing.assert_close(embeds[real], expected["inputs_embeds"][real], **CLOSE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("projector."))
    out = model(input_ids=ids, attention_mask=mask, pixel_values=image, labels=expected["targets"])
    torch.testing.assert_close(out.logits[real].detach(), expected["logits"][real], **CLOSE)
    torch.testing.assert_close(out.loss.detach(), expected["loss"][0], **CLOSE)
    nll = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].transpose(1, 2), expected["targets"][:, 1:], reduction="none"
    )
    per_row = nll.detach().sum(1) / nll.shape[1]  # over padding as well: a quirk of upstream's
    torch.testing.assert_close(per_row, expected["loss_none"], **CLOSE)
    if not prefix:
        out.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
        torch.testing.assert_close(norm, expected["grad_norm"][0], **CLOSE)
        for name in [name for name in expected if name.startswith("grad.")]:
            ours = name.removeprefix("grad.").replace("llama_model.base_model.model.", "language_model.")
            ours = ours.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
            torch.testing.assert_close(
                gradients[ours.replace("llama_proj", "projector")], expected[name], **CLOSE
            )


def test_padding_may_be_left_out_of_upstreams_batch(model, expected):
    """Right padding without a mask, as training does it, and the loss from answer positions alone."""
    ids = expected["input_ids"].masked_fill(expected["input_ids"] == -200, model.config.image_token_id)
    targets = expected["targets"][:, 1:]
    b, at = (targets != -100).nonzero().unbind(1)
    with torch.no_grad():
        (logits,) = model(
            input_ids=ids, pixel_values=expected["image"], predict_at=b * ids.shape[1] + at
        ).exit_logits
    loss = torch.nn.functional.cross_entropy(logits, targets[b, at])
    torch.testing.assert_close(loss, expected["loss"][0], **CLOSE)


@pytest.mark.parametrize("kind", ["gen_eval", "gen_plain"])
@pytest.mark.parametrize("prefix", ["", "interp_"])
def test_upstreams_greedy_answers(tmp_path, folder, expected, texts, prefix, kind):
    """Conversation texts begin with a second BOS. The first expected column was never fed."""
    if prefix:
        folder = converted(tmp_path / "model", {"--image_size": "84"})
    model, processor = load(folder), MiniGPTv2Processor.from_pretrained(folder)
    rows = [processor.encode_text(text) for text in texts[f"{prefix}{kind}_texts"]]
    ids, mask = padded(rows, processor.tokenizer.pad_token_id, left=True)
    assert torch.equal(mask, expected[f"{prefix}{kind}_mask"])
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=expected[f"{prefix}image"],
        max_new_tokens=8,
        do_sample=False,
    )
    wanted = expected[f"{prefix}{kind}_ids"][:, 1:]
    for got, tokens in zip(out[:, ids.shape[1] :].tolist(), wanted.tolist(), strict=True):
        length = tokens.index(2) + 1 if 2 in tokens else len(tokens)
        assert got[:length] == tokens[:length]


def test_upstreams_conversations(model, processor, expected, texts):
    """Several turns: further questions begin with BOS, and only answers are learned.

    Upstream pads prompts and what follows them apart, so that rows are longer than the longest.
    """
    turns = [[part.split(texts["connect_sym"]) for part in texts[key]] for key in ("conv_q", "conv_a")]
    rows = [processor.encode_conversation(*turn) for turn in zip(*turns, strict=True)]
    length, pad = expected["conv_targets"].shape[1], processor.tokenizer.pad_token_id
    targets = torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows])
    ids = torch.tensor([row + [pad] * (length - len(row)) for row, _ in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row, _ in rows])
    assert torch.equal(targets, expected["conv_targets"])
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, pixel_values=expected["image"], labels=targets)
    torch.testing.assert_close(out.loss, expected["conv_loss"][0], **CLOSE)
    torch.testing.assert_close(out.logits[:, -1], expected["conv_logits_last"], **CLOSE)


@given(text=st.text(alphabet="ab AB[]/?!.<>é▁\n", max_size=30), begins=st.booleans())
def test_every_text_is_tokenised_as_by_sentencepiece(processor, text, begins):
    """Between special tokens each piece by itself, as upstream's slow tokenizer does it."""
    tokenizer = processor.tokenizer
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(FIXTURE / "llama" / "tokenizer.model"))
    ids = tokenizer.encode(f"<s>{text}" if begins else text, add_special_tokens=False)
    assert ids == [1] * begins + pieces.encode(text)


def test_an_answer_is_cut_as_upstreams(processor):
    processor.max_txt_len, before = 3, processor.max_txt_len
    assert len(processor.encode_answer("a small dog runs on the green grass.")) == 3
    processor.max_txt_len = before


def checkpoint():
    return dict(torch.load(FIXTURE / "minigptv2.pth", weights_only=True)["model"])


def in_shards(folder, kind):
    """The language model in two files of this kind."""
    shutil.copytree(FIXTURE / "llama", folder)
    (folder / "model.safetensors").unlink()
    weights = load_file(FIXTURE / "llama" / "model.safetensors")
    stem, write = ("model", save_file) if kind == "safetensors" else ("pytorch_model", torch.save)
    of_name = {}
    for number, names in enumerate([sorted(weights)[::2], sorted(weights)[1::2]]):
        file = f"{stem}-{number}.{kind}"
        write({name: weights[name] for name in names}, folder / file)
        of_name |= dict.fromkeys(names, file)
    content = {"metadata": {}, "weight_map": of_name}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(content))
    return folder


def weights_of(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = [*dict.fromkeys(index.values()), "adapter_model.safetensors"]
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def assert_same(folder, other):
    ours, theirs = weights_of(folder), weights_of(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_language_model_in_several_files(tmp_path, folder, kind):
    other = converted(tmp_path / "model", {"--llama": str(in_shards(tmp_path / "llama", kind))})
    assert_same(other, folder)


def test_names_of_a_newer_peft(tmp_path, folder):
    newer = {
        name.replace("lora_A.weight", "lora_A.default.weight").replace(
            "lora_B.weight", "lora_B.default.weight"
        ): t
        for name, t in checkpoint().items()
    }
    torch.save({"model": newer, "epoch": 3}, tmp_path / "newer.pth")
    other = converted(tmp_path / "model", {"--ckpt": str(tmp_path / "newer.pth")})
    assert_same(other, folder)


def test_what_a_checkpoint_trained_takes_the_place_of_what_it_started_from(tmp_path):
    trained = {
        "ln_vision.weight": torch.full((64,), 2.0),
        "ln_vision.bias": torch.full((64,), 3.0),
        "visual_encoder.blocks.1.mlp.fc1.bias": torch.full((279,), 4.0),
    }
    torch.save({"model": {**checkpoint(), **trained}}, tmp_path / "more.pth")
    tower = load(converted(tmp_path / "model", {"--ckpt": str(tmp_path / "more.pth")})).vision_model
    assert float(tower.post_layernorm.weight[0]) == 2.0 and float(tower.post_layernorm.bias[0]) == 3.0
    assert float(tower.encoder.layers[1].mlp.fc1.bias[0]) == 4.0


def test_without_adapters(tmp_path):
    plain = {name: tensor for name, tensor in checkpoint().items() if "lora_" not in name}
    torch.save({"model": plain}, tmp_path / "plain.pth")
    folder = converted(tmp_path / "model", {"--ckpt": str(tmp_path / "plain.pth")})
    assert not (folder / "adapter_config.json").exists()
    assert not [name for name, _ in load(folder).named_parameters() if "lora" in name]


def test_the_released_tower_lost_its_last_block(tmp_path, capsys):
    """Of 40 blocks upstream builds 39."""
    eva = torch.load(FIXTURE / "eva_vit.pth", weights_only=True)
    blocks = {
        f"blocks.{number}.{name.split('.', 2)[2]}": t
        for number in range(40)
        for name, t in eva.items()
        if name.startswith("blocks.1.")
    }
    torch.save(
        {**{n: t for n, t in eva.items() if not n.startswith("blocks.")}, **blocks}, tmp_path / "g.pth"
    )
    folder = converted(tmp_path / "model", {"--vit": str(tmp_path / "g.pth")})
    assert load(folder).config.vision_config.num_hidden_layers == 39
    assert "not used: g.pth: blocks.*.norm*.weight (2 of them)" in capsys.readouterr().out


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_is_let_go_of(tmp_path, is_zip):
    """A mapped one after every tensor; one that must be read in whole is read once, and alone."""
    for file in ("eva_vit.pth", "minigptv2.pth"):
        content = torch.load(FIXTURE / file, weights_only=True)
        torch.save(content, tmp_path / file, _use_new_zipfile_serialization=is_zip)
    options = ConvertOptions(
        llama=str(in_shards(tmp_path / "llama", "bin")),
        vit=str(tmp_path / "eva_vit.pth"),
        ckpt=str(tmp_path / "minigptv2.pth"),
        image_size=56,
        vit_heads=4,
        lora_alpha=8,
    )
    released = Released(options)
    sources = (released.llama, released.vit, released.ckpt)
    for source in sources:
        source.close()
    opened = []
    for _ in released.tensors():
        now = [source._open[0] for source in sources if source._open is not None]
        assert len(now) <= 1
        opened += now if now != opened[-1:] else []
    expected = [] if is_zip else [tmp_path / "eva_vit.pth", tmp_path / "minigptv2.pth"]
    assert opened == expected


def spoilt(tmp_path, what):
    """A changed flag and its file."""
    path = tmp_path / "spoilt.pth"
    if what == "truncated":
        path.write_bytes((FIXTURE / "eva_vit.pth").read_bytes()[:5000])
        return {"--vit": str(path)}
    if what == "truncated safetensors":
        folder = tmp_path / "llama"
        shutil.copytree(FIXTURE / "llama", folder)
        (folder / "model.safetensors").write_bytes(
            (FIXTURE / "llama" / "model.safetensors").read_bytes()[:9000]
        )
        return {"--llama": str(folder)}
    if what == "runs code":
        torch.save({"model": {**checkpoint(), "args": Path("x")}}, path)
        return {"--ckpt": str(path)}
    if what == "smaller vocabulary":
        folder = tmp_path / "llama"
        shutil.copytree(FIXTURE / "llama", folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:300].clone()
        save_file(weights, folder / "model.safetensors")
        return {"--llama": str(folder)}
    if what == "missing, unknown, mis-shaped":
        model = checkpoint()
        model["llama_proj.bias"] = torch.zeros(3)
        model["llama_model.base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(
            4, 64
        )
        del model["llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
        torch.save({"model": model}, path)
        return {"--ckpt": str(path)}
    if what == "no config":
        folder = tmp_path / "llama"
        shutil.copytree(FIXTURE / "llama", folder)
        (folder / "config.json").unlink()
        return {"--llama": str(folder)}
    return {"--image_size": "50"} if what == "size" else {"--vit_heads": "5"}


@pytest.mark.parametrize(
    ("what", "lines"),
    [
        (
            "truncated",
            ["spoilt.pth: cannot be read; expected a whole file that torch.save wrote; was its"],
        ),
        ("truncated safetensors", ["model.safetensors: cannot be read ("]),
        (
            "runs code",
            ["spoilt.pth: holds pathlib.PosixPath, whose loading would run code; expected tensors alone"],
        ),
        ("smaller vocabulary", ["its tokenizer knows 384 tokens, its embedding 300; expected as many"]),
        (
            "missing, unknown, mis-shaped",
            [
                "language_model.model.layers.0.self_attn.q_proj.lora_B.default.weight: missing; expected (6",
                "layers.9.self_attn.q_proj.lora_A.weight: unknown; the model has no language_model.model.lay",
                "llama_proj.bias: got (3,); expected (64,)",
                "--allow_missing NAME ... takes it without",
            ],
        ),
        ("no config", ["llama: config.json is missing; expected all files of the Llama."]),
        ("heads", ["--vit_heads 5: does not divide the tower's width 64; expected the number that it was"]),
        ("size", ["--image_size 50: gives 9 patches of 14 pixels; expected a multiple of 28, such as 56"]),
    ],
)
def test_files_that_do_not_fit(tmp_path, capsys, what, lines):
    assert main(typed(tmp_path / "model", spoilt(tmp_path, what))) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(lines) and all(line.startswith("scalefl: ") for line in said)
    assert all(part in line for part, line in zip(lines, said, strict=True))
    assert not list(tmp_path.glob("*model*"))


WHOLE = {"--llama": "llama", "--vit": "eva_vit.pth", "--ckpt": "minigptv2.pth"}


@pytest.mark.parametrize(("slot", "file"), [(s, f) for s in WHOLE for o, f in WHOLE.items() if s != o])
def test_a_file_in_another_s_place(tmp_path, capsys, slot, file):
    """The line names the flag's file, and what it is."""
    is_what = {
        "llama": "",
        "eva_vit.pth": "this is the vision tower (patch_embed.proj.weight)",
        "minigptv2.pth": "this is a checkpoint of MiniGPT-v2 (llama_proj.weight)",
    }[file]
    assert main(typed(tmp_path / "model", {slot: str(FIXTURE / file)})) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert file in line and (is_what if slot != "--llama" else "expected model.safetensors, ") in line
    assert not (tmp_path / "model").exists()


def test_what_is_not_told_is_the_released_models():
    options = ConvertOptions()
    assert (options.image_size, options.vit_heads, options.lora_alpha) == (448, 16, 16.0)
    assert (options.prompt_template, options.end_sym, options.max_txt_len) == (
        "[INST] {} [/INST]",
        "</s>",
        500,
    )


def test_what_may_be_missing_is_named(tmp_path, capsys):
    model = checkpoint()
    model["odd.weight"] = torch.zeros(3)
    del model["llama_proj.bias"]
    torch.save({"model": model}, tmp_path / "less.pth")
    changed = {"--ckpt": str(tmp_path / "less.pth")}
    assert main(typed(tmp_path / "model", changed)) == 2
    more = ["--allow-missing", "projector.bias", "odd.*"]
    assert main(typed(tmp_path / "model", changed, more=more)) == 0
    said = capsys.readouterr().out
    assert "missing, starts anew: projector.bias" in said and "not used: less.pth: odd.weight" in said
    assert float(load(tmp_path / "model").projector.bias.abs().max()) == 0.0
    assert main(typed(tmp_path / "again", changed, more=[*more, "nothing.*"])) == 2
    assert "--allow_missing nothing.*: nothing has such a name" in capsys.readouterr().err


def test_a_folder_that_is_there_is_left_alone(folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert main(typed(folder)) == 2
    assert "is there already; expected a new folder" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, capsys):
    """safetensors gives the system's error in its text alone."""

    def fail(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("scalefl.conversion.command.write_adapters", fail)
    assert main(typed(tmp_path / "model")) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("scalefl:")]
    assert said.startswith(f"scalefl: {tmp_path / 'model'}: No space left on device; free some space")
    assert list(tmp_path.iterdir()) == []


OF_THE_FIXTURE = {"lora_r": 4, "lora_alpha": 8.0, "tuning": "lora"}


def test_a_run_starts_from_the_adapters(tmp_path, folder):
    forget_launch()
    state = federation(tmp_path, init_from=str(folder), **OF_THE_FIXTURE).initial_state
    adapters = {name: tensor for name, tensor in state.items() if "lora_" in name}
    found = load_file(folder / "adapter_model.safetensors")
    assert len(adapters) == len(found) == 16
    for name, tensor in found.items():
        ours = name.removeprefix("base_model.model.").replace("lora_A.", "lora_A.default.")
        assert torch.equal(adapters[ours.replace("lora_B.", "lora_B.default.")], tensor)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"tuning": "lora", "lora_r": 8}, "has other adapters; expected --lora_r 4 --lora_alpha 8."),
        ({"tuning": "full"}, "has adapters beside its weights, which --tuning full does not train"),
    ],
)
def test_a_run_that_does_not_fit_the_adapters(tmp_path, folder, options, line):
    forget_launch()
    with pytest.raises(Exception, match=line.replace(".", r"\.")):
        federation(tmp_path, init_from=str(folder), **options)


def upstreams_yaml(path, **model):
    """A model file with upstream's own keys."""
    content = {
        "model": {
            "arch": "minigpt_v2",
            "image_size": 56,
            "llama_model": str(FIXTURE / "llama"),
            "vit_model": str(FIXTURE / "eva_vit.pth"),
            "ckpt": str(FIXTURE / "minigptv2.pth"),
            "end_sym": "</s>",
            "lora_r": 4,
            "lora_alpha": 8,
            **model,
        },
        "vision": {
            "hidden_size": 64,
            "intermediate_size": 279,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
        },
        "text": {
            "hidden_size": 64,
            "intermediate_size": 172,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "vocab_size": 384,
        },
    }
    path.write_text(yaml.safe_dump(content))
    return str(path)


def train(tmp_path, *typed, **model):
    forget_launch()
    options = ["--tuning", "lora", "--data", "synthetic", "--num_patients", "16", "--num_clients", "2"]
    options += ["--vertical_scale_ratios", "1.0", "--horizontal_scale_ratios", "1", "--ee_locs"]
    options += ["--client_split_ratios", "1.0", "--partitioner", "iid", "--num_epoch", "1"]
    cfg_path = ["--cfg-path", upstreams_yaml(tmp_path / "minigpt.yaml", **model)]
    return main(["train", *cfg_path, "--save_path", str(tmp_path / "run"), *options, *typed])


def test_a_run_of_upstreams_own_yaml(tmp_path, folder, capsys):
    """Converted once, into the run's folder; without training the released adapters are the result."""
    assert train(tmp_path, "--num_rounds", "1", "--lr", "0") == 0
    model = tmp_path / "run" / "model"
    assert_same(model, folder)
    state = load_file(tmp_path / "run" / "checkpoints" / "round-0001" / "model.safetensors")
    found = load_file(folder / "adapter_model.safetensors")
    assert len([name for name in state if "lora_" in name]) == len(found)
    for name, tensor in found.items():
        ours = name.removeprefix("base_model.model.").replace("lora_A.", "lora_A.default.")
        assert torch.equal(state[ours.replace("lora_B.", "lora_B.default.")], tensor)
    before = {path: path.stat().st_mtime_ns for path in model.iterdir()}
    assert main(["train", "--resume", str(tmp_path / "run"), "--num_rounds", "2"]) == 0
    assert {path: path.stat().st_mtime_ns for path in model.iterdir()} == before


def test_what_was_trained_fits_the_llama_that_was_converted(tmp_path, folder):
    """The adapter of a run, by peft on the folder of the released language model itself."""
    from peft import PeftModel

    assert train(tmp_path, "--num_rounds", "1", "--lr", "0.05", "--optimizer", "sgd") == 0
    checkpoint = str(tmp_path / "run" / "checkpoints" / "round-0001")
    before = load_file(folder / "adapter_model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(FIXTURE / "llama", dtype=torch.float32).eval()
    typed = ["export", "--checkpoint", checkpoint]
    assert main([*typed, "--part", "adapter", "--out", str(tmp_path / "adapter")]) == 0
    assert main([*typed, "--out", str(tmp_path / "whole")]) == 0
    ours = load(tmp_path / "whole")
    ids = torch.tensor([[1, 40, 50, 60, 70, 80]])
    with torch.no_grad():
        embeds = ours.input_embeds(ids, None)
        expected = ours(inputs_embeds=embeds, attention_mask=torch.ones_like(ids)).logits
        released = load(folder)(inputs_embeds=embeds, attention_mask=torch.ones_like(ids)).logits
        adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        got = adapted(inputs_embeds=embeds, attention_mask=torch.ones_like(ids)).logits
    assert float((got - expected).abs().max()) <= 1e-4
    assert float((released - expected).abs().max()) > 1e-2, "nothing was trained"
    after = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(after) == len(before)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (
            {"vit_model": "eva_clip_g"},
            "model.vit_model: got 'eva_clip_g'; expected the path of eva_vit_g.p",
        ),
        ({"ckpt": None}, "model.ckpt: got None; expected the path of minigptv2_checkpoint.pth"),
    ],
)
def test_a_yaml_whose_files_are_not_here(tmp_path, capsys, model, line):
    assert train(tmp_path, **model) == 2
    (said,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("scalefl:")]
    assert line in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "bound"), [("none", 1e-4), ("int8", 0.05), ("nf4", 0.5)])
def test_the_same_checkpoint_quantised(tmp_path, folder, expected, kind, bound):
    """Relative distance of the logits from upstream's, after four layers.

    A weight errs by 1/254 of its row's largest in int8, and in NF4 by up to 0.14 of its block's: half of the
    widest gap. Unrelated logits are 1.4 away.
    """
    forget_launch()
    fed = federation(
        tmp_path, init_from=str(folder), quantization=kind, feature_cache="off", **OF_THE_FIXTURE
    )
    level = fed.store.models.evaluated_levels[-1]
    model = fed.store.submodel(level, fed.initial_state, own=False).eval()
    ids = expected["input_ids"].masked_fill(expected["input_ids"] == -200, model.config.image_token_id)
    real = expected["attention_mask"].bool()
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=expected["attention_mask"], pixel_values=expected["image"])
    off = (out.logits[real] - expected["logits"][real]).norm() / expected["logits"][real].norm()
    assert float(off) <= bound
    assert kind == "none" or float(off) > 1e-4


def test_a_source_tells_what_it_holds():
    source = Source(FIXTURE / "minigptv2.pth", inside="model")
    assert source.shapes["llama_proj.weight"] == (64, 256) and len(source) == 22
