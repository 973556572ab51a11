"""Laws of the model: generation, scoring, loss, padding, initial weights, gradients."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from builders import ANSWERS, RUN, Built, batcher, build_store, model_file, processor, whole_model
from torch import Tensor

from scalefl.batches import Candidates
from scalefl.models.build import new_model
from scalefl.models.minigptv2 import FAMILY

CANDIDATES = Candidates(ids=tuple(tuple(processor().encode_answer(answer)) for answer in ANSWERS))
FP32 = {"rtol": 1e-4, "atol": 1e-4}
"""Logits up to 10 after some hundred fp32 operations in another order; a wrong token or mask adds 0.1."""


@pytest.fixture(scope="module")
def built() -> Built:
    return build_store()


@pytest.fixture(scope="module")
def model(built: Built) -> Any:
    return whole_model(built)


def prompt(i: int) -> tuple[Tensor, Tensor]:
    """Token ids (1, L) without padding, and pixels, of one example."""
    inputs = batcher().prompts([i])
    assert bool(inputs["attention_mask"].all())
    return inputs["input_ids"], inputs["pixel_values"]


def plain_logits(model: Any, ids: Tensor, pixels: Tensor, exit: int | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels, exit=exit).logits


@pytest.mark.parametrize("exit", [1, 2, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_equals_an_argmax_loop_without_cache(
    model: Any, exit: int, use_cache: bool
) -> None:
    """In one left-padded batch of prompts of different length, and each alone without padding."""
    inputs = batcher().prompts([0, 1, 2])
    assert not bool(inputs["attention_mask"].all())
    steps, width = 6, inputs["input_ids"].shape[1]
    out = model.generate(
        **inputs, exit=exit, max_new_tokens=steps, do_sample=False, use_cache=use_cache, eos_token_id=None
    )
    for row, i in zip(out[:, width:], [0, 1, 2], strict=True):
        ids, pixels = prompt(i)
        for _ in range(steps):
            following = plain_logits(model, ids, pixels, exit)[:, -1].argmax(-1)
            ids = torch.cat([ids, following[:, None]], dim=1)
        assert row.tolist() == ids[0, -steps:].tolist()


def test_generation_stops_at_the_end_symbol(model: Any) -> None:
    """With every other token suppressed the answer is one </s>, though nine may be written."""
    end, (ids, pixels) = processor().tokenizer.eos_token_id, prompt(0)
    others = [token for token in range(280) if token != end]
    out = model.generate(
        input_ids=ids, pixel_values=pixels, max_new_tokens=9, do_sample=False, suppress_tokens=others
    )
    assert out[0, ids.shape[1] :].tolist() == [end]


def test_labels_give_the_mean_cross_entropy_of_answer_tokens(model: Any) -> None:
    rows = [prompt(i) for i in (0, 2)]
    ids = torch.cat([torch.cat([row, torch.tensor([CANDIDATES.ids[0]])], dim=1) for row, _ in rows])
    labels = ids.clone()
    labels[:, : -len(CANDIDATES.ids[0])] = -100
    pixels = torch.cat([image for _, image in rows])
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels, labels=labels)
    nats = []
    for b in range(2):
        for at in range(ids.shape[1]):
            if labels[b, at] != -100:
                nats.append(-out.logits[b, at - 1].double().log_softmax(-1)[labels[b, at]])
    assert len(nats) == 2 * len(CANDIDATES.ids[0])
    torch.testing.assert_close(out.loss.double(), torch.stack(nats).mean(), rtol=1e-5, atol=0)


def test_packed_scoring_equals_one_candidate_at_a_time(model: Any) -> None:
    """Answers of 4 to 9 tokens, two of them alike at first, behind prompts of different length."""
    assert CANDIDATES.ids[2][0] == CANDIDATES.ids[3][0]
    inputs = batcher().scoring([0, 1, 2], CANDIDATES)
    with torch.no_grad():
        packed = [CANDIDATES.log_likelihoods(z.unflatten(0, (3, -1))) for z in model(**inputs).exit_logits]
    for b in range(3):
        ids, pixels = prompt(b)
        for a, answer in enumerate(CANDIDATES.ids):
            row = torch.cat([ids, torch.tensor([answer])], dim=1)
            for exit, scores in enumerate(packed, start=1):
                log_probs = plain_logits(model, row, pixels, exit)[0].log_softmax(-1)
                first = ids.shape[1] - 1
                alone = sum(log_probs[first + s, token] for s, token in enumerate(answer))
                torch.testing.assert_close(
                    scores[b, a], alone, rtol=1e-4, atol=1e-3
                )  # a sum of up to 9 logits


def test_packed_scoring_does_not_depend_on_the_attention_kernel() -> None:
    model, inputs = whole_model(build_store()), batcher().scoring([0, 1, 2], CANDIDATES)
    with torch.no_grad():
        expected = model(**inputs).exit_logits[-1]
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(**inputs).exit_logits[-1], expected, **FP32)


@pytest.mark.parametrize("candidates", [((7,), (8,)), ((7, 2), (8,))], ids=["nothing packed", "one packed"])
def test_scoring_of_single_tokens(model: Any, candidates: tuple[tuple[int, ...], ...]) -> None:
    one = Candidates(ids=candidates)
    inputs = batcher().scoring([0, 1], one)
    with torch.no_grad():
        scores = one.log_likelihoods(model(**inputs).exit_logits[-1].unflatten(0, (2, -1)))
    for b in range(2):
        log_probs = plain_logits(model, *prompt(b))[0, -1].log_softmax(-1)
        torch.testing.assert_close(scores[b, 1], log_probs[8], **FP32)


def test_padding_does_not_change_logits(model: Any) -> None:
    """Reference defect 6: left padding with a mask, right padding without one, and no padding agree."""
    ids, pixels = prompt(0)
    alone, length = plain_logits(model, ids, pixels), ids.shape[1]
    padding = torch.full((1, 5), processor().tokenizer.pad_token_id)
    right = plain_logits(model, torch.cat([ids, padding], dim=1), pixels)[:, :length]
    torch.testing.assert_close(right, alone, **FP32)
    mask = torch.tensor([[0] * 5 + [1] * length])
    with torch.no_grad():
        left = model(
            input_ids=torch.cat([padding, ids], dim=1), attention_mask=mask, pixel_values=pixels
        ).logits
    torch.testing.assert_close(left[:, 5:], alone, **FP32)


def test_training_logits_are_those_of_each_example_alone(model: Any) -> None:
    data = batcher()
    batch, at = data.training([0, 1, 2]), 0
    with torch.no_grad():
        together = model(**batch.inputs).exit_logits
        for i in range(3):
            alone = data.training([i])
            for exit, logits in enumerate(model(**alone.inputs).exit_logits):
                torch.testing.assert_close(together[exit][at : at + len(alone.targets)], logits, **FP32)
            at += len(alone.targets)
    assert at == len(batch.targets)


def test_an_earlier_exit_is_the_same_alone_and_among_all(model: Any) -> None:
    batch = batcher().training([0])
    with torch.no_grad():
        exits = model(**batch.inputs).exit_logits
        for exit in (1, 2, 3):
            alone = model(
                input_ids=batch.inputs["input_ids"], pixel_values=batch.inputs["pixel_values"], exit=exit
            )
            at = alone.logits.flatten(0, 1)[batch.inputs["predict_at"]]
            torch.testing.assert_close(exits[exit - 1], at, **FP32)


@pytest.fixture
def features(model: Any) -> Tensor:
    """What the tower says of the images of three examples."""
    with torch.no_grad():
        return model.vision_features(batcher().prompts([0, 1, 2])["pixel_values"])


def with_features(inputs: Mapping[str, Tensor], features: Tensor) -> dict[str, Any]:
    return {n: v for n, v in inputs.items() if n != "pixel_values"} | {"image_features": features}


def test_features_in_place_of_pixels_are_the_same_to_every_use(model: Any, features: Tensor) -> None:
    """Logits, the loss and packed scores bit for bit; generation with and without a cache."""
    data = batcher()
    assert features.shape == (3, 4, 4 * 32)
    prompts = data.prompts([0, 1, 2])
    with torch.no_grad():
        for inputs in (data.training([0, 1, 2]).inputs, data.scoring([0, 1, 2], CANDIDATES)):
            expected, got = model(**inputs), model(**with_features(inputs, features))
            pairs = zip(expected.exit_logits, got.exit_logits, strict=True)
            assert all(torch.equal(right, mine) for right, mine in pairs)
        expected = model(**prompts, labels=prompts["input_ids"])
        got = model(**with_features(prompts, features), labels=prompts["input_ids"])
    assert torch.equal(got.logits, expected.logits) and torch.equal(got.loss, expected.loss)
    for use_cache in (True, False):
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
        for exit in (1, 3):
            texts = model.generate(**prompts, exit=exit, **options)
            assert torch.equal(
                model.generate(**with_features(prompts, features), exit=exit, **options), texts
            )


def test_an_image_is_given_once(model: Any, features: Tensor) -> None:
    inputs = batcher().training([0, 1, 2]).inputs
    with pytest.raises(ValueError, match="pixel_values or image_features, not both"):
        model(**inputs, image_features=features)


@pytest.mark.parametrize("cut", [lambda x: x[:2], lambda x: x[:, :3]], ids=["images", "tokens"])
def test_features_and_their_places_in_the_prompts_must_agree(
    model: Any, features: Tensor, cut: Callable[[Tensor], Tensor]
) -> None:
    inputs = with_features(batcher().training([0, 1, 2]).inputs, cut(features))
    with pytest.raises(ValueError, match=r"12 image tokens in input_ids, \d+ in image_features"):
        model(**inputs)


def test_a_model_without_its_tower_knows_images_by_their_features(model: Any, features: Tensor) -> None:
    """Scales of the tower's layers go with it."""
    built = build_store()
    for part in built.store.models.slices.values():
        part.config.input_scales = {"vision_model.encoder.layers.0.mlp.fc2": 2.0, "projector": 0.5}
    bare: Any = whole_model(built)
    FAMILY.drop_vision(bare)
    bare.apply_input_scales()
    assert not [name for name, _ in bare.named_parameters() if FAMILY.is_vision(name)]
    inputs = batcher().training([0, 1, 2]).inputs
    with pytest.raises(ValueError, match="tower was dropped; give image_features"):
        bare(**inputs)
    with torch.no_grad():
        expected = model(**with_features(inputs, features * 0.5)).exit_logits
        got = bare(**with_features(inputs, features)).exit_logits
    assert all(torch.equal(right, mine) for right, mine in zip(expected, got, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tower_and_features_may_have_another_type_than_the_rest(
    model: Any, features: Tensor, dtype: torch.dtype
) -> None:
    """The projector reads them in its own type; under autocast in autocast's."""
    inputs = batcher().training([0, 1, 2]).inputs
    narrow, widened = (with_features(inputs, f) for f in (features.to(dtype), features.to(dtype).float()))
    with torch.no_grad():
        assert torch.equal(model(**narrow).exit_logits[-1], model(**widened).exit_logits[-1])
        with torch.autocast("cpu", torch.bfloat16):
            got = model.image_embeds(features.to(dtype))
            assert got.dtype == torch.bfloat16
            assert torch.equal(got, model.image_embeds(features.to(dtype).bfloat16()))
        half: Any = whole_model(build_store())
        half.vision_model.to(dtype)
        by_pixels = half(**inputs).exit_logits[-1]
        half_features = half.vision_features(inputs["pixel_values"])
        assert half_features.dtype == dtype
        by_features = half(**with_features(inputs, half_features))
        assert by_pixels.dtype == torch.float32 and torch.equal(by_features.exit_logits[-1], by_pixels)
        with torch.autocast("cpu", torch.bfloat16):  # as a run in bf16 does, whatever the tower is held in
            assert torch.equal(half.vision_features(inputs["pixel_values"]), half_features)
    torch.testing.assert_close(half_features.float(), features, rtol=0, atol=0.05)  # 2^-8 of up to 4, twice


@pytest.mark.parametrize("exit", [0, -1, 4])
def test_an_exit_that_is_not_there_is_refused(model: Any, exit: int) -> None:
    ids, pixels = prompt(0)
    with pytest.raises(ValueError, match=f"exit {exit}.*1 to 3"):
        plain_logits(model, ids, pixels, exit)


@pytest.mark.parametrize("num_images", [0, 2])
def test_images_and_their_places_in_the_prompts_must_agree(model: Any, num_images: int) -> None:
    """Two images for one prompt, or a prompt whose image is missing, would go unnoticed."""
    ids, pixels = prompt(0)
    given = torch.cat([pixels] * 2)[:num_images] if num_images else None
    with pytest.raises(ValueError, match="image"), torch.no_grad():
        model(input_ids=ids, pixel_values=given)


def test_initial_weights_have_the_standard_deviation_asked_for() -> None:
    """`Blip2VisionConfig` has 1e-10: nothing learns. 0.02 within 5 %; 1.3 % is one sigma of 3072 draws."""
    model = new_model(RUN, FAMILY, FAMILY.config(model_file(), processor()))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter.numel() > 3000:
            assert 0.019 < float(parameter.detach().std()) < 0.021, name
        if "norm" in name:
            assert bool((parameter == (1.0 if name.endswith("weight") else 0.0)).all()), name
    tower = [p for n, p in model.named_parameters() if n.startswith("vision_model.encoder") and p.ndim > 1]
    assert min(float(p.detach().std()) for p in tower) > 0.015
    embeddings = model.vision_model.embeddings
    assert float(embeddings.patch_embedding.weight.detach().std()) > 0.015
    assert float(embeddings.position_embedding.detach().std()) > 0.015
    assert float(embeddings.class_embedding.detach().std()) > 0.01


def test_adapters_leave_the_logits_as_they_are_at_first() -> None:
    plain = build_store(tuning="full", freeze_vit=True, random_weights=False)
    adapted = build_store(tuning="lora", random_weights=False)
    inputs = batcher().training([0, 1]).inputs
    with torch.no_grad():
        pairs = zip(
            whole_model(plain)(**inputs).exit_logits, whole_model(adapted)(**inputs).exit_logits, strict=True
        )
    assert all(torch.equal(mine, other) for mine, other in pairs)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_gradient_checkpointing_gives_the_same_gradients(tuning: str) -> None:
    built, batch = build_store(tuning=tuning), batcher().training([0, 1])
    gradients = []
    for checkpointing in (False, True):
        model = built.store.submodel(2, built.state, own=True).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        sum(z.square().sum() for z in model(**batch.inputs).exit_logits).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, recomputed = gradients
    for name, gradient in plain.items():
        assert gradient is not None and torch.equal(gradient, recomputed[name]), name
