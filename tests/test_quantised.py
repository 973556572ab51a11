"""Laws of weights in few bits: cut as views, equal to bitsandbytes, never rewritten, never kept unpacked.

`EPS` bounds an fp32 rounding: two fp32 sums of the same K products, in whatever order, differ by at most
2 K EPS times the sum of the products' sizes (Higham, Accuracy and Stability of Numerical Algorithms, 3.1).
"""

import gc
from collections.abc import Iterator

import bitsandbytes.functional
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import LEVEL, OneClient, plain_client
from runs import MODEL, arguments, federation, forget_launch, largest_difference
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from scalefl.cli import main
from scalefl.models.quantised import NESTED_BLOCK, QuantisedLinear, QuantisedWeight, dequantise, quantise

EPS = 2.0**-24
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: EPS, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half a unit in the last place; fp16's subnormals are far below every product here."""

KINDS = {
    "nf4": {"kind": "nf4", "transposed": False, "double_quant": False},
    "nf4 across": {"kind": "nf4", "transposed": True, "double_quant": False},
    "nf4 nested": {"kind": "nf4", "transposed": False, "double_quant": True},
    "nf4 nested across": {"kind": "nf4", "transposed": True, "double_quant": True},
    "int8": {"kind": "int8", "transposed": False, "double_quant": False},
}
"""Every way to hold a weight (O, I)."""

every_kind = pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of different size, from 1/16 to 16: scales that differ."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 2.0 ** torch.randint(-4, 5, (*shape[:-1], 1), generator=generator)
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


def values(weight: QuantisedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """(O, I), whichever way it is held."""
    held = dequantise(weight, dtype)
    return held.t() if weight.transposed else held


def same_bits(one: Tensor, other: Tensor) -> bool:
    bits = {4: torch.int32, 2: torch.int16, 1: torch.int8}[one.element_size()]
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(bits), other.contiguous().view(bits)
    )


@st.composite
def cuts(draw: st.DrawFn) -> tuple[dict, tuple[int, int], tuple[slice, slice]]:
    """How a weight is held, its shape, and a cut that it allows: of NF4 whole packed rows."""
    how = draw(st.sampled_from(list(KINDS.values())))
    rows = draw(st.integers(1, 150))
    columns = 64 * draw(st.integers(1, 5)) if how["kind"] == "nf4" else draw(st.integers(1, 150))
    kept_rows = draw(st.integers(1, rows))
    kept_columns = columns if how["kind"] == "nf4" else draw(st.integers(1, columns))
    shape, kept = (rows, columns), (kept_rows, kept_columns)
    if how["transposed"]:
        shape, kept = shape[::-1], kept[::-1]
    return how, shape, (slice(0, kept[0]), slice(0, kept[1]))


@given(cut=cuts(), held=st.sampled_from(FLOATS), out=st.sampled_from(FLOATS), seed=st.integers(0, 9))
@settings(max_examples=80)
def test_a_cut_unpacks_to_the_slice_of_the_whole(cut, held, out, seed):
    """Bit for bit, also where it ends within a block of scales; and it shares storage, part by part."""
    how, shape, index = cut
    whole = quantise(random(*shape, seed=seed, dtype=held), **how)
    part = whole.cut(index)
    assert whole.shape == shape and part.shape == tuple(i.stop for i in index)
    assert same_bits(values(part, out), values(whole, out)[index])
    for name, tensor in part.tensors.items():
        of_whole = whole.tensors[name]
        assert tensor.data_ptr() == of_whole.data_ptr(), name
        assert tensor.untyped_storage().data_ptr() == of_whole.untyped_storage().data_ptr(), name


@pytest.mark.parametrize("transposed", [False, True])
def test_a_cut_within_a_block_of_nested_scales(transposed):
    """7 rows of 192 weights are 21 scales, of 256 that share one: no round numbers anywhere."""
    how = {"kind": "nf4", "transposed": transposed, "double_quant": True}
    weight = random(100, 192)
    whole = quantise(weight.t() if transposed else weight, **how)
    for rows in (7, 85, 86, 100):  # 255, 258 and 300 scales
        index = (slice(0, 192), slice(0, rows)) if transposed else (slice(0, rows), slice(0, 192))
        part = whole.cut(index)
        assert len(part.tensors["nested"]) == -(-rows * 3 // NESTED_BLOCK)
        assert same_bits(values(part), values(whole)[index])


def test_nf4_is_not_cut_across_its_blocks():
    whole = quantise(random(8, 128), kind="nf4", transposed=False, double_quant=True)
    with pytest.raises(ValueError, match=r"nf4 weight \(8, 128\): cut to \(4, 64\), across"):
        whole.cut((slice(0, 4), slice(0, 64)))
    with pytest.raises(ValueError, match="rows of 96 weights; expected a multiple of 64"):
        quantise(random(64, 96), kind="nf4", transposed=False, double_quant=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_nf4_is_bitsandbytes(dtype, double_quant, transposed):
    held = random(130, 128, dtype=dtype)
    weight = held.t() if transposed else held
    packed, packing = bitsandbytes.functional.quantize_4bit(
        held, blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )
    expected = bitsandbytes.functional.dequantize_4bit(packed, packing)
    ours = quantise(weight, kind="nf4", transposed=transposed, double_quant=double_quant)
    assert same_bits(dequantise(ours, dtype), expected)


def test_nf4_is_the_nearest_of_sixteen_values():
    """Those of the paper (Dettmers et al. 2023, appendix E), times the largest of 64 neighbours.

    Which of two values is nearest is decided with a rounding of EPS.
    """
    code = torch.tensor(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
        + [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
        + [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
        + [0.7229568362236023, 1.0]
    )
    weight = random(20, 128)
    largest = weight.view(20, 2, 64).abs().amax(-1, keepdim=True)
    distance = (weight.view(20, 2, 64, 1) - code * largest.unsqueeze(-1)).abs()
    got = values(quantise(weight, "nf4", transposed=False, double_quant=False)).view(20, 2, 64)
    error = (weight.view(20, 2, 64) - got).abs()
    assert bool((error <= distance.amin(-1) + 4 * EPS * largest).all())
    assert bool((got.unsqueeze(-1) == code * largest.unsqueeze(-1)).any(-1).all())


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_rounds_to_127_steps_of_the_largest_in_a_row(dtype):
    weight = random(33, 70, dtype=dtype)
    weight[5] = 0.0
    as_taken = weight.half().float()  # bitsandbytes' kernel takes fp16
    scales = as_taken.abs().amax(1) / 127
    steps = (as_taken * (127 / as_taken.abs().amax(1, keepdim=True))).round()
    steps[5] = 0.0
    ours = quantise(weight, "int8", transposed=False, double_quant=False)
    assert torch.equal(ours.tensors["scales"], scales)
    assert torch.equal(values(ours), steps * scales[:, None])
    error, half_a_step = (values(ours) - as_taken).abs(), scales[:, None] * (0.5 + 127 * 4 * EPS)
    assert bool((error <= half_a_step).all())


def layer(how: dict, compute: torch.dtype, outputs: int = 192, inputs: int = 128) -> QuantisedLinear:
    return QuantisedLinear(quantise(random(outputs, inputs), **how), compute)


def run(module: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of the input, under `upstream`."""
    x = x.clone().requires_grad_()
    y = module(x)
    (grad,) = torch.autograd.grad(y, x, upstream.to(y.dtype))
    return y.detach(), grad


def within(got: Tensor, expected: Tensor, left: Tensor, right: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether two products left @ right differ by their fp32 sums and by one rounding to each of `dtypes`.

    Two values that round to one type may end a whole unit apart.
    """
    count = left.shape[-1]
    sizes = left.abs().double() @ right.abs().double()
    allowed = 2 * count * EPS * sizes
    for dtype in dtypes:
        allowed = allowed + 2 * ROUNDING[dtype] * (expected.abs().double() + allowed)
    return bool(((got.double() - expected.double()).abs() <= allowed).all())


@every_kind
@pytest.mark.parametrize("compute", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_a_plain_one_of_the_unpacked_values(how, compute, dtype):
    """Output and input gradient; in the input's own type, through the type chosen for computing."""
    ours = layer(how, compute)
    plain = nn.Linear(128, 192, bias=False, dtype=compute).requires_grad_(False)
    plain.weight.copy_(ours.unpacked())
    x, upstream = random(3, 5, 128, seed=1).to(dtype) / 16, random(3, 5, 192, seed=2).to(dtype) / 16
    y, grad = run(ours, x, upstream)
    expected_y, expected_grad = run(plain, x.to(compute), upstream)
    assert y.dtype == grad.dtype == dtype
    weight = plain.weight
    assert within(y, expected_y.to(dtype), x.to(compute), weight.t(), compute, dtype)
    assert within(grad, expected_grad.to(dtype), upstream.to(compute), weight, compute, dtype)
    assert float(y.abs().mean()) > 0.1 and float(grad.abs().mean()) > 0.1


@every_kind
def test_autocast_leaves_the_compute_dtype(how):
    ours, x, upstream = layer(how, torch.float32), random(4, 128, seed=1), random(4, 192, seed=2)
    plain = run(ours, x, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        under = run(ours, x, upstream)
        assert nn.functional.linear(x, ours.unpacked()).dtype == torch.bfloat16  # what it is kept from
    assert all(same_bits(one, other) for one, other in zip(plain, under, strict=True))


@every_kind
@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing_changes_nothing(how, autocast):
    first, second = layer(how, torch.bfloat16), layer(how, torch.bfloat16, 128, 192)

    class Block(nn.Module):
        def __init__(self, checkpoints: bool) -> None:
            super().__init__()
            self.checkpoints = checkpoints

        def forward(self, x: Tensor) -> Tensor:
            if self.checkpoints:
                return checkpoint(lambda h: second(torch.tanh(first(h))), x, use_reentrant=False)
            return second(torch.tanh(first(x)))

    x, upstream = random(4, 128, seed=1), random(4, 128, seed=2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain, recomputed = (run(Block(checkpoints), x, upstream) for checkpoints in (False, True))
    assert all(same_bits(one, other) for one, other in zip(plain, recomputed, strict=True))


def floats_of(size: int) -> list[Tensor]:
    """Floating-point tensors of that many elements that Python can reach, each storage once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.is_floating_point() and thing.numel() == size:
            found[thing.untyped_storage().data_ptr()] = thing
    return list(found.values())


@every_kind
def test_nothing_but_the_packed_weight_waits_for_the_backward_pass(how):
    """A plain layer keeps its weight; ours nothing, and what it unpacks outlives no pass."""
    outputs, inputs = 7 * 64, 5 * 64  # a size that nothing else has
    ours = layer(how, torch.bfloat16, outputs, inputs)
    x = random(2, inputs, seed=1).requires_grad_()
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        y = ours(x * 1.0)
        assert not [tensor for tensor in saved if tensor.numel() in (x.numel(), outputs * inputs)]
        assert not floats_of(outputs * inputs)
        kept = nn.Linear(inputs, outputs, bias=False)
        also = kept(x * 1.0)
    assert outputs * inputs in {tensor.numel() for tensor in saved}  # both meters see what a plain one keeps
    assert len(floats_of(outputs * inputs)) == 1
    del kept, also
    saved.clear()
    y.sum().backward()
    assert not floats_of(outputs * inputs)
    assert x.grad is not None and all(p.grad is None and not p.requires_grad for p in ours.parameters())


def test_linear4bit_agrees_where_it_is_safe():
    """bitsandbytes' own layer in training mode, its repacking off."""
    weight, x, upstream = random(192, 128), random(6, 128, seed=1), random(6, 192, seed=2)
    ours = QuantisedLinear(quantise(weight, **KINDS["nf4 nested"]), torch.float32)
    theirs = theirs_of(weight)
    theirs.support_avx512bf16_for_cpu = False
    (y, grad), (their_y, their_grad) = (run(module.train(), x, upstream) for module in (ours, theirs))
    unpacked = ours.unpacked()
    assert within(y, their_y, x, unpacked.t())
    assert within(grad, their_grad, upstream, unpacked)


def theirs_of(weight: Tensor) -> nn.Module:
    outputs, inputs = weight.shape
    module = bitsandbytes.nn.Linear4bit(
        inputs, outputs, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    module.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    return module.to("cpu")


@pytest.mark.skipif(
    not bitsandbytes.functional.has_avx512bf16(), reason="only CPUs with AVX512-BF16 repack weights"
)
@pytest.mark.filterwarnings("ignore:.*gemv_4bit")
def test_bitsandbytes_own_layer_is_ruined_by_an_evaluation():
    """The hazard that our layer is held against below: when this fails, bitsandbytes has mended it."""
    weight, x, upstream = random(192, 128), random(6, 128, seed=1), random(6, 192, seed=2)
    theirs = theirs_of(weight)
    _, before = run(theirs.train(), x, upstream)
    packed = theirs.weight.data.clone()
    with torch.no_grad():
        theirs.eval()(x)
    assert not torch.equal(theirs.weight.data.flatten(), packed.flatten())
    x.requires_grad_()
    theirs.train()(x).backward(upstream)
    assert x.grad is None or not torch.allclose(x.grad, before, rtol=0.1)


@every_kind
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_our_layer_is_not(how, compute):
    ours, x, upstream = layer(how, compute), random(6, 128, seed=1), random(6, 192, seed=2)
    packed = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    before = run(ours.train(), x, upstream)
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            assert same_bits(ours.eval()(x), before[0])
    after = run(ours.train(), x, upstream)
    assert all(same_bits(one, other) for one, other in zip(before, after, strict=True))
    assert all(torch.equal(tensor, packed[name]) for name, tensor in ours.state_dict().items())


WIDE = {"text": MODEL["text"] | {"hidden_size": 64, "intermediate_size": 96}}
"""NF4 packs 64 neighbours."""


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_after_evaluating_and_generating_is_as_without(tmp_path, quantization, precision):
    """On the sub-model itself, and on one that is built anew on the same base."""
    options = {"tuning": "lora", "quantization": quantization, "precision": precision, "feature_cache": "off"}
    fed = federation(tmp_path, WIDE, **options, lora_targets=["q_proj", "o_proj", "down_proj"])
    state = {n: t + 0.01 for n, t in fed.initial_state.items()}  # adapters whose B is not zero
    batch = fed.batchers["train"].training([0, 1, 2])
    prompt = fed.processor.encode_question(fed.data.splits["train"][0].question)

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        with fed.engine.autocast():
            logits = model.train()(**batch.inputs).exit_logits
        sum(nn.functional.cross_entropy(exit.float(), batch.targets) for exit in logits).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    model = fed.store.submodel(LEVEL, state, own=True)
    parts = {
        f"{name}/{part}": (tensor, tensor.clone())
        for name, weight in fed.store.base.items()
        if isinstance(weight, QuantisedWeight)
        for part, tensor in weight.tensors.items()
    }
    assert len(parts) == 2 * 7 * (4 if quantization == "nf4" else 2)  # of two layers of seven weights
    before = gradients(model)
    other = fed.store.submodel(LEVEL, state, own=False)
    with torch.no_grad(), fed.engine.autocast():
        for evaluated in (model.eval(), other.eval()):
            evaluated(**batch.inputs)
            evaluated.generate(
                input_ids=torch.tensor([prompt]),
                pixel_values=batch.inputs["pixel_values"][:1],
                max_new_tokens=3,
                do_sample=False,
            )
    for after in (gradients(model), gradients(fed.store.submodel(LEVEL, state, own=True))):
        assert all(same_bits(after[name], before[name]) for name in before)
        assert all(bool(grad.any()) for name, grad in after.items() if "lora" in name)
    assert all(same_bits(tensor, kept) for tensor, kept in parts.values())


class PlainCast(nn.Linear):
    """A linear layer of one type among activations of another."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def plain_layers(model: nn.Module) -> int:
    """Put plain layers of the same values in place of quantised ones; their number."""
    quantised = {name: part for name, part in model.named_modules() if isinstance(part, QuantisedLinear)}
    for name, part in quantised.items():
        weight = part.unpacked()
        plain = PlainCast(part.in_features, part.out_features, bias=False, dtype=weight.dtype)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        model.set_submodule(name, plain)
    return len(quantised)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_compute_dtype_is_what_quantised_layers_compute_in(tmp_path, quantization):
    """In an fp32 run: as a plain loop on layers of that type, and unlike fp32.

    Two kernels sum in other orders, and what they sum may round to neighbours in bf16.
    """
    options = {"tuning": "lora", "quantization": quantization}
    client = OneClient(tmp_path, WIDE, **options, quant_compute_dtype="bf16")
    task, sent = client.task(), client.fed.store.models.level_state(LEVEL, client.state)
    model = client.fed.store.submodel(LEVEL, client.state, own=True)
    assert plain_layers(model) == 2 * 7
    trained = plain_client(model, client.run, client.batcher, task)
    expected = {name: tensor - sent[name] for name, tensor in trained.items()}
    auto = OneClient(tmp_path, WIDE, **options)
    in_bf16, in_fp32 = client.train(task), auto.train(task)
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    from_fp32 = largest_difference(in_bf16, in_fp32)
    assert from_fp32 > 2**-9 * largest
    assert largest_difference(in_bf16, expected) <= from_fp32 / 8


def test_what_stays_unquantised(tmp_path):
    """Embedding, head, norms and tower; projector and adapters are trained."""
    fed = federation(tmp_path, WIDE, tuning="lora", quantization="nf4")
    packed = {name for name, weight in fed.store.base.items() if isinstance(weight, QuantisedWeight)}
    assert packed == {name for name in fed.store.models.base_shapes if "_proj." in name}
    assert len(packed) == 2 * 7
    across = {name for name in packed if fed.store.base[name].transposed}
    assert across == {name for name in packed if "o_proj" in name or "down_proj" in name}


@pytest.fixture
def refused(tmp_path, capsys) -> Iterator:
    def lines(*typed: str, **options) -> list[str]:
        forget_launch()
        assert main(arguments(tmp_path, *typed, **options)) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err.splitlines()

    return lines


@pytest.mark.parametrize("base_store", ["resident", "file"])
def test_rows_that_nf4_cannot_pack_are_refused(refused, base_store):
    typed = f"--tuning lora --quantization nf4 --base_store {base_store}".split()
    *_, line = refused(*typed)
    assert line == (
        "scalefl: --quantization nf4: language_model.model.layers.0.self_attn.q_proj.base_layer.weight has "
        "16 weights in a row; expected a multiple of 64, which share scales; use int8 or none, or another "
        "hidden_size."
    )


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--tuning lora --quantization nf4 --width_axes all", "which --width_axes all would cut"),
        ("--tuning full --quantization int8", "--tuning full trains those weights"),
    ],
    ids=["across", "full"],
)
def test_what_quantisation_does_not_go_with_is_refused(refused, typed, words):
    (line,) = refused(*typed.split(), model=WIDE)
    assert line.startswith("scalefl: ") and "quantization" in line and words in line
