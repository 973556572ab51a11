"""The model gives the numbers of upstream's own code: towers, projector, logits, loss and gradients."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scalefl.models.adapters import LoraSpec, add_lora
from scalefl.models.minigptv2 import FAMILY, MiniGPTv2Config, MiniGPTv2ForConditionalGeneration

FIXTURE = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "minigptv2-tiny"


def upstream_model() -> MiniGPTv2ForConditionalGeneration:
    """The fixture's raw weights in our names, by the rules of its README."""
    sizes = json.loads((FIXTURE / "config.json").read_text())
    vision, llama = sizes["vision"], json.loads((FIXTURE / "llama" / "config.json").read_text())
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    config = MiniGPTv2Config(
        vision_config={
            "hidden_size": vision["embed_dim"],
            "intermediate_size": vision["mlp_hidden"],
            "num_hidden_layers": vision["depth"],
            "num_attention_heads": vision["num_heads"],
            "patch_size": vision["patch_size"],
            "image_size": sizes["image_size"],
            "layer_norm_eps": vision["block_norm_eps"],
        },
        text_config={key: llama[key] for key in (*same, "rms_norm_eps", "max_position_embeddings")},
        ln_vision_eps=vision["ln_vision_eps"],
        image_token_id=sizes["llama"]["vocab_size"],  # outside the vocabulary, as for Llama-2
    )
    model = FAMILY.new_model(config)
    lora = sizes["lora"]
    targets = tuple(lora["target_modules"])
    add_lora(model, LoraSpec(rank=lora["r"], alpha=lora["alpha"], dropout=lora["dropout"], targets=targets))
    state = {
        "vision_model.post_layernorm.weight": torch.ones(64),
        "vision_model.post_layernorm.bias": torch.zeros(64),
    }
    eva = torch.load(FIXTURE / "eva_vit.pth", weights_only=True)
    for i in range(vision["depth"]):
        q_bias, v_bias = (eva.pop(f"blocks.{i}.attn.{x}_bias") for x in "qv")
        eva[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    renamed = (
        ("cls_token", "embeddings.class_embedding"),
        ("pos_embed", "embeddings.position_embedding"),
        ("patch_embed.proj", "embeddings.patch_embedding"),
        ("blocks.", "encoder.layers."),
        ("attn.proj.", "attn.projection."),
        (".attn.", ".self_attn."),
        (".norm", ".layer_norm"),
    )
    for name, tensor in eva.items():
        for theirs, ours in renamed:
            name = name.replace(theirs, ours)
        state[f"vision_model.{name}"] = tensor
    for name, tensor in load_file(FIXTURE / "llama" / "model.safetensors").items():
        if targets[0] in name or targets[1] in name:
            name = name.replace(".weight", ".base_layer.weight")
        if "inv_freq" not in name:
            state[f"language_model.{name}"] = tensor
    for name, tensor in torch.load(FIXTURE / "minigptv2.pth", weights_only=True)["model"].items():
        if name.startswith("llama_proj."):
            state[name.replace("llama_proj", "projector")] = tensor
        elif "lora" in name:
            name = name.replace("llama_model.base_model.model.", "language_model.")
            state[name.replace(".weight", ".default.weight")] = tensor
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    return model.eval()


@pytest.mark.skipif(not FIXTURE.is_dir(), reason=f"no numbers of upstream's code at {FIXTURE}")
def test_forward_loss_and_gradients_are_upstreams() -> None:
    """1e-4: two versions of transformers, fp32, values up to 10; the gradients are those of the same loss."""
    model, expected = upstream_model(), load_file(FIXTURE / "expected.safetensors")
    model.projector.requires_grad_()  # adding adapters froze it
    close = {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        vit = model.vision_model.encoder(inputs_embeds=model.vision_model.embeddings(expected["image"]))
        image_embeds = model.image_embeds(model.vision_features(expected["image"]))
    torch.testing.assert_close(vit.last_hidden_state, expected["vit_out"], **close)  # before ln_vision
    torch.testing.assert_close(image_embeds, expected["image_embeds"], **close)
    ids = expected["input_ids"].masked_fill(expected["input_ids"] == -200, model.config.image_token_id)
    mask = expected["attention_mask"]
    out = model(
        input_ids=ids, attention_mask=mask, pixel_values=expected["image"], labels=expected["targets"]
    )
    real = mask.bool()
    with torch.no_grad():
        embeds = model.input_embeds(ids, expected["image"])
    torch.testing.assert_close(embeds[real], expected["inputs_embeds"][real], **close)
    torch.testing.assert_close(out.logits[real].detach(), expected["logits"][real], **close)
    torch.testing.assert_close(out.loss.detach(), expected["loss"][0], **close)
    (gradient_norm,) = expected["grad_norm"]
    trained = [p for n, p in model.named_parameters() if "lora_" in n or n.startswith("projector.")]
    out.loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in trained]).sum().sqrt()
    torch.testing.assert_close(norm, gradient_norm, **close)
    gradients = {n: p.grad for n, p in model.named_parameters()}
    for name in [n for n in expected if n.startswith("grad.")]:
        ours = name.removeprefix("grad.").replace("llama_model.base_model.model.", "language_model.")
        ours = ours.replace("lora_A.weight", "lora_A.default.weight").replace(
            "lora_B.weight", "lora_B.default.weight"
        )
        torch.testing.assert_close(
            gradients[ours.replace("llama_proj", "projector")], expected[name], **close
        )


@pytest.mark.skipif(not FIXTURE.is_dir(), reason=f"no numbers of upstream's code at {FIXTURE}")
def test_padding_may_be_left_out_of_upstreams_batch() -> None:
    """Right padding without a mask, as training does it, and the loss from answer positions alone."""
    model, expected = upstream_model(), load_file(FIXTURE / "expected.safetensors")
    ids = expected["input_ids"].masked_fill(expected["input_ids"] == -200, model.config.image_token_id)
    targets = expected["targets"][:, 1:]
    b, at = (targets != -100).nonzero().unbind(1)
    with torch.no_grad():
        (logits,) = model(
            input_ids=ids, pixel_values=expected["image"], predict_at=b * ids.shape[1] + at
        ).exit_logits
    loss = torch.nn.functional.cross_entropy(logits, targets[b, at])
    torch.testing.assert_close(loss, expected["loss"][0], rtol=1e-4, atol=1e-4)
