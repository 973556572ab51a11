"""Laws of the local optimizers: all are AdamW, as near as their state allows, and none remembers a client."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from plain import OneClient
from runs import largest_difference, same_bits
from torch import Tensor, nn

from scalefl.config.options import RunConfig
from scalefl.contracts import InputError
from scalefl.engine.optimizers import PAGED, _bitsandbytes, check_optimizer, forget, make_optimizer

NAMES = ("sgd", "adamw", "adamw_8bit", *PAGED)
LR, STEPS = 1e-3, 10
SMALL, LARGE = 4095, 50_003
"""Elements of a tensor whose state stays fp32, and of one whose last block of 256 is not full."""

unpaged = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="pages need a CUDA GPU")


def config(name: str, **changes: Any) -> RunConfig:
    momentum = 0.9 if name == "sgd" else 0.0
    options: dict[str, Any] = {"lr": LR, "weight_decay": 0.1, "momentum": momentum, **changes}
    return RunConfig(optimizer=name, **options)  # type: ignore[arg-type]  # one of NAMES


def weights(size: int, device: str = "cpu") -> nn.Parameter:
    return nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device))


def train(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, seed: int, steps: int = STEPS) -> Tensor:
    """Steps along gradients that share a direction; the change of the parameter, on the CPU."""
    before, draws = parameter.detach().clone(), torch.Generator().manual_seed(seed)
    direction = torch.randn(parameter.numel(), generator=draws)
    for _ in range(steps):
        noise = torch.randn(parameter.numel(), generator=draws)
        parameter.grad = (0.01 * (direction + noise)).to(parameter.device)
        optimizer.step()
    return (parameter.detach() - before).cpu()


def change(name: str, size: int, device: str = "cpu", **changes: Any) -> Tensor:
    parameter = weights(size, device)
    return train(make_optimizer([parameter], config(name, **changes)), parameter, seed=1)


@unpaged
@pytest.mark.parametrize("name", ["adamw_8bit", *PAGED])
def test_state_in_fp32_is_adamw(name: str) -> None:
    """Weights below 4 round by up to 1.2e-7; two roundings a step in each of the two: 10 x 4 x 1.2e-7."""
    size = LARGE if name == "paged_adamw_32bit" else SMALL
    got, expected = change(name, size), change("adamw", size)
    assert float((got - expected).abs().max()) < 5e-6
    assert float(expected.abs().max()) > 5 * LR
    no_decay = change(name, size, weight_decay=0.0)
    assert float((got - no_decay).abs().max()) > 1e-4  # 10 steps take 0.1 x 0.001 of each weight, each


@unpaged
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_state_in_8_bits_stays_near_adamw(name: str) -> None:
    """The code has 64 values in its largest decade: moments err by some per cent, a whole change by less."""
    got, expected = change(name, LARGE), change("adamw", LARGE)
    assert 0 < float((got - expected).norm()) < 0.03 * float(expected.norm())


@unpaged
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bits_are_held_in_8_bits(name: str) -> None:
    """Two moments of a byte, two fp32 scales for each block of 256."""
    parameter = weights(LARGE)
    optimizer = make_optimizer([parameter], config(name))
    train(optimizer, parameter, seed=1, steps=1)
    state = optimizer.state[parameter]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    own = [value for key, value in state.items() if torch.is_tensor(value) and not key.startswith("qmap")]
    assert sum(tensor.nbytes for tensor in own) == 2 * LARGE + 2 * 4 * -(-LARGE // 256)


@unpaged
@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("name", NAMES)
def test_rate_zero_changes_nothing(name: str, size: int) -> None:
    assert not change(name, size, lr=0.0).any()


@pytest.mark.parametrize("name", ["adamw_8bit"])
def test_zero_gradients_change_nothing(name: str) -> None:
    """LoRA's A has none at the first step: B is zero then."""
    parameter = weights(LARGE)
    before, optimizer = (
        parameter.detach().clone(),
        make_optimizer([parameter], config(name, weight_decay=0.0)),
    )
    parameter.grad = torch.zeros(LARGE)
    optimizer.step()
    assert torch.equal(parameter, before)
    assert train(optimizer, parameter, seed=1).isfinite().all()


@unpaged
@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("name", NAMES)
def test_after_forgetting_an_optimizer_is_as_good_as_new(name: str, size: int) -> None:
    used = weights(size)
    optimizer = make_optimizer([used], config(name))
    train(optimizer, used, seed=2, steps=3)
    forget(optimizer)
    with torch.no_grad():
        used.copy_(weights(size))
    assert same_bits({"": train(optimizer, used, seed=1)}, {"": change(name, size)})


@unpaged
@pytest.mark.parametrize(("name", "kind"), [(PAGED[0], "PagedAdamW"), (PAGED[1], "PagedAdamW8bit")])
def test_pages_are_used_again(monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    """On stand-ins for pages, which need a GPU: two levels, three clients each, in turn."""
    bnb = _bitsandbytes()
    manager: Any = bnb.functional.GlobalPageManager.get_instance()
    monkeypatch.setattr(manager, "paged_tensors", [])
    monkeypatch.setattr(bnb.functional, "prefetch_tensor", lambda page: None)
    monkeypatch.setattr(bnb.functional, "fill", lambda page, value: page.fill_(value))

    def allocate(self: Any, parameter: Tensor, dtype: torch.dtype = torch.float32) -> Any:
        page: Any = torch.zeros_like(parameter, dtype=dtype)
        page.is_paged, page.page_deviceid = True, parameter.device.index
        self.page_mng.paged_tensors.append(page)
        return page

    expected = {size: change(name, size) for size in (LARGE, 2 * LARGE)}
    monkeypatch.setattr(getattr(bnb.optim, kind), "get_state_buffer", allocate)
    for _ in range(2):
        for size in (LARGE, 2 * LARGE):
            parameter = weights(size)
            optimizer = make_optimizer([parameter], config(name))
            for _ in range(3):
                with torch.no_grad():
                    parameter.copy_(weights(size))
                got = train(optimizer, parameter, seed=1)
                assert same_bits({"": got}, {"": expected[size]})
                forget(optimizer)
    assert len(manager.paged_tensors) == 2 * 2  # two moments of two sizes

    both = [weights(LARGE), weights(LARGE)]
    optimizer = make_optimizer(both, config(name))
    for parameter in both:
        parameter.grad = torch.ones(LARGE)
    optimizer.step()
    in_use = [id(optimizer.state[p][moment]) for p in both for moment in ("state1", "state2")]
    assert len(set(in_use)) == 4


@on_gpu
@pytest.mark.parametrize("name", PAGED)
def test_pages_on_a_gpu(name: str) -> None:
    """More than 100 000 elements are paged; the reference is the same optimizer unpaged."""
    size = 200_003
    parameter = weights(size, "cuda")
    optimizer: Any = make_optimizer([parameter], config(name))
    counts = []
    for _ in range(3):
        with torch.no_grad():
            parameter.copy_(weights(size))
        got = train(optimizer, parameter, seed=1)
        assert optimizer.state[parameter]["state1"].is_paged
        forget(optimizer)
        counts.append(len(optimizer.page_mng.paged_tensors))
    assert len(set(counts)) == 1
    expected = change("adamw" if name == "paged_adamw_32bit" else "adamw_8bit", size, "cuda")
    assert float((got - expected).abs().max()) < 5e-6


@pytest.mark.parametrize(
    ("name", "offloaded", "line"),
    [
        ("paged_adamw_8bit", False,
         "--optimizer: paged_adamw_8bit pages its state between GPU and host, but this run is on the CPU; "
         "expected adamw_8bit or adamw, or a CUDA GPU."),
        ("paged_adamw_32bit", False,
         "--optimizer: paged_adamw_32bit pages its state between GPU and host, but this run is on the CPU; "
         "expected adamw, or a CUDA GPU."),
        ("paged_adamw_8bit", True,
         "--optimizer: paged_adamw_8bit pages its state between GPU and host, but the launch keeps "
         "optimizers on the CPU already; expected adamw_8bit or adamw, or a launch without "
         "optimizer offload."),
    ],
)  # fmt: skip
def test_pages_without_a_gpu_are_refused(name: str, offloaded: bool, line: str) -> None:
    with pytest.raises(InputError) as refusal:
        check_optimizer(config(name), torch.device("cuda" if offloaded else "cpu"), offloaded=offloaded)
    assert str(refusal.value) == line


def test_bitsandbytes_without_cuda_is_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _bitsandbytes().cextension.lib
    gpu = torch.device("cuda")
    monkeypatch.setattr(library, "compiled_with_cuda", False, raising=False)
    for name in ("adamw_8bit", *PAGED):
        with pytest.raises(InputError, match=f"--optimizer: {name} needs bitsandbytes' CUDA library"):
            check_optimizer(config(name), gpu)
    monkeypatch.setattr(library, "compiled_with_cuda", True, raising=False)
    for name in NAMES:
        check_optimizer(config(name), gpu)
    for name in ("sgd", "adamw", "adamw_8bit"):
        check_optimizer(config(name), torch.device("cpu"))


def test_pytorchs_optimizers_do_not_wait_for_bitsandbytes() -> None:
    """Its import takes seconds."""
    code = (
        "import sys, torch; from scalefl.config.options import RunConfig; "
        "from scalefl.engine.optimizers import check_optimizer, make_optimizer; "
        "run = RunConfig(); check_optimizer(run, torch.device('cuda')); "
        "make_optimizer([torch.nn.Parameter(torch.ones(2))], run); "
        "assert 'bitsandbytes' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


ADAMW_8BIT = {"optimizer": "adamw_8bit", "momentum": 0.0, "lr": 1e-3}


def test_a_session_with_8_bit_adamw_equals_a_plain_loop(tmp_path) -> None:
    """No adapter of the small model has 4096 elements, so that its state is fp32.

    Rounding of gradients moves a step by less than lr / 20, as for adamw: 4 steps.
    """
    client = OneClient(tmp_path, **ADAMW_8BIT, tuning="lora", lora_r=4, weight_decay=0.1, num_epoch=2)
    got, expected = client.train(client.task(count=8)), client.plain(client.task(count=8))
    assert largest_difference(got, expected) <= 0.05 * 4 * client.run.lr
    assert any(bool(tensor.any()) for tensor in expected.values())


def test_a_client_does_not_see_the_one_before(tmp_path) -> None:
    """The embedding and the head have 280 x 16 elements: their moments are in 8 bits."""
    client = OneClient(tmp_path, **ADAMW_8BIT)
    later = client.task(client=3)
    assert same_bits(client.train(client.task(), client.task(count=5), later), client.train(later))
