"""The op among PyTorch's machinery: autograd, autocast, checkpointing, torch.compile, opcheck, the choice of kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mirai_ds.config import ConfigError
from mirai_ds.kernels import build
from mirai_ds.kernels.foresight_cosine import choose, foresight_cosine, op
from tests.kernels.cases import BF16, DEVICES, F16, F32, assert_as_exact_as_torch, evaluate, random_case

on_devices = pytest.mark.parametrize("device", DEVICES)


@on_devices
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_opcheck(device: str, dtype: torch.dtype) -> None:
    choose(device, device)
    case = random_case(2, 9, 11, 3, 40, dtype).to(device)
    constants = (case.target, case.index, case.weights, case.counts)
    for projected in (case.projected, case.stacked().projected):
        leaves = [p.detach().requires_grad_() for p in projected]
        torch.library.opcheck(torch.ops.mirai.foresight_cosine, (leaves, *constants, True, 1.0, True, False))
    # With `overwrite` the backward pass changes the third output, which opcheck, other than the wrapper, looks at.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.mirai.foresight_cosine, (leaves, *constants, True, 1.0, True, True), test_utils=tests
    )
    for flag in (False, True):
        torch.library.opcheck(torch.ops.mirai.foresight_cosine, (case.projected, *constants, False, 1.0, False, flag))
    received = torch.tensor(0.5, device=device)
    copies = [p.clone() for p in case.projected]
    torch.library.opcheck(torch.ops.mirai.foresight_cosine_rescale_, (copies, received, 1.0))
    torch.library.opcheck(torch.ops.mirai.foresight_cosine_rescale, (copies, received, 1.0, BF16))


@on_devices
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("received", "expected"), [(1.0, 1.0), (0.25, 0.25), (3.0, 1.0), (1.0, 0.7), (0.0, 1.0)])
def test_any_upstream_gradient_is_right(device: str, dtype: torch.dtype, received: float, expected: float) -> None:
    case = random_case(2, 9, 11, 3, 33, dtype).to(device)
    assert_as_exact_as_torch(case, device, received, expected)
    if received == 0:
        assert float(evaluate(case, device, received, expected)[2].abs().max()) == 0


@on_devices
def test_an_expected_gradient_of_zero_is_no_division(device: str) -> None:
    case = random_case(2, 9, 11, 2, 16).to(device)
    assert torch.equal(evaluate(case, device, 1.0, 0.0)[2], evaluate(case, device)[2])


@on_devices
@pytest.mark.parametrize("received", [0.5, 1.0])
def test_what_was_written_in_the_forward_pass_is_handed_out(device: str, received: float) -> None:
    """The heads receive the memory that the forward pass filled, expected factor or not: no second buffer."""
    case = random_case(2, 9, 11, 2, 16).to(device)
    written: list[int] = []
    arrived: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        written.append(tensor.data_ptr())
        return tensor

    doubled = [p.requires_grad_() * 2 for p in case.projected]
    for states in doubled:
        states.register_hook(lambda gradient: arrived.append(gradient.data_ptr()))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = foresight_cosine(doubled, *case.rest, kernel=device, upstream=0.5)
    (loss * received).backward()
    assert len(written) == 2
    assert sorted(arrived) == sorted(written)


@on_devices
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_kept_graph_can_be_walked_again(device: str, dtype: torch.dtype) -> None:
    case = random_case(2, 9, 11, 3, 24, dtype).to(device)
    leaves = [p.requires_grad_() for p in case.projected]
    loss, _ = foresight_cosine(leaves, *case.rest, kernel=device)
    gradients = [torch.autograd.grad(loss * scale, leaves, retain_graph=True) for scale in (3.0, 0.5, 1.0)]
    for scale, found in zip((3.0, 0.5, 1.0), gradients, strict=True):
        assert torch.equal(torch.stack(found, 2), evaluate(case, device, scale)[2])


@on_devices
def test_no_gradient_where_none_is_asked(device: str) -> None:
    case = random_case(2, 9, 11, 3, 24).to(device)
    loss, _ = foresight_cosine(case.projected, *case.rest, kernel=device)
    assert not loss.requires_grad
    with torch.no_grad():
        again, _ = foresight_cosine([p.requires_grad_() for p in case.projected], *case.rest, kernel=device)
    assert not again.requires_grad
    target = case.target.clone().requires_grad_()
    loss, cosine = foresight_cosine(case.projected, target, *case.rest[1:], kernel=device)
    assert not cosine.requires_grad
    loss.backward()
    assert target.grad is None
    assert torch.equal(loss, again)


@on_devices
def test_a_second_derivative_is_refused_not_wrong(device: str) -> None:
    case = random_case(1, 4, 4, 1, 8).to(device)
    states = case.projected[0].requires_grad_()
    loss, _ = foresight_cosine([states * states], *case.rest, kernel=device)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, states, create_graph=True)


@on_devices
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_autocast_changes_nothing(device: str, dtype: torch.dtype) -> None:
    case = random_case(2, 9, 11, 3, 40, dtype).to(device)
    wanted = evaluate(case, device)
    with torch.autocast(device, torch.bfloat16):
        found = evaluate(case, device)
    assert found[0].dtype == F32
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)


class Heads(torch.nn.Module):
    """Two projections and the loss: what training does around the op."""

    def __init__(self, device: str, kernel: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weights = torch.nn.ParameterList(torch.randn(24, 24, generator=generator).to(device) for _ in range(2))
        self.case, self.kernel = random_case(2, 9, 11, 2, 24).to(device), kernel

    def forward(self, states: Tensor) -> Tensor:
        """The loss of `states` (2, 9, 24)."""
        projected = [torch.nn.functional.silu(states @ weight) for weight in self.weights]
        return foresight_cosine(projected, *self.case.rest, kernel=self.kernel)[0] * 0.3


def gradients(heads: Heads, loss: Tensor, states: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, [states, *heads.parameters()])]


@on_devices
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(device: str, reentrant: bool) -> None:
    heads = Heads(device, device)
    states = heads.case.projected[0].clone().requires_grad_()
    wanted = gradients(heads, heads(states), states)
    loss = checkpoint(heads, states, use_reentrant=reentrant)
    states.grad = None
    loss.backward()
    found = [loss.detach(), states.grad, *(p.grad for p in heads.parameters())]
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)


@on_devices
def test_compiled_without_a_graph_break(device: str) -> None:
    heads, plain = Heads(device, device), Heads(device, "reference")
    states = heads.case.projected[0].clone().requires_grad_()
    wanted = gradients(plain, plain(states), states)
    eager = gradients(heads, heads(states), states)
    compiled = torch.compile(heads, fullgraph=True)
    found = gradients(heads, compiled(states), states)
    for mine, uncompiled, theirs in zip(found, eager, wanted, strict=True):
        scale = float(theirs.abs().max())
        assert float((uncompiled - theirs).abs().max()) < 3e-6 * scale
        assert float((mine - theirs).abs().max()) < 3e-6 * scale


def test_kernels_agree_on_the_message_for_wrong_arguments() -> None:
    case = random_case(2, 9, 11, 3, 5)
    for name, value in (
        ("projected", case.projected[:2]),
        ("projected", [case.projected[0], case.projected[1][..., :4], case.projected[2]]),
        ("projected", [p[:, :8] for p in case.projected]),
        ("projected", [torch.stack([p, p], 2) for p in case.projected]),
        ("target", torch.zeros(3, 11, 5)),
        ("target", torch.zeros(2, 11)),
        ("weights", torch.ones(2)),
        ("counts", torch.ones(4)),
        ("index", torch.zeros(9, 2, dtype=torch.int32)),
    ):
        wrong = replace(case, **{name: value})
        with pytest.raises(ValueError, match=r"expected|need|one"):
            foresight_cosine(wrong.projected, *wrong.rest, kernel="cpu")
    with pytest.raises(ValueError, match="reduction = 'max'"):
        foresight_cosine(case.projected, *case.rest[:-1], "max", kernel="cpu")


def test_dtypes_that_no_kernel_has() -> None:
    case = random_case(2, 9, 11, 3, 5)
    with pytest.raises(TypeError, match="float64 needs kernel: reference"):
        foresight_cosine(case.double().projected, *case.rest, kernel="cpu")
    with pytest.raises(TypeError, match="target: float32, bfloat16 or float16"):
        foresight_cosine(case.projected, case.target.double(), *case.rest[1:], kernel="cpu")
    mixed = [case.projected[0].bfloat16(), *case.projected[1:]]
    with pytest.raises(TypeError, match="one dtype"):
        foresight_cosine(mixed, *case.rest, kernel="cpu")
    assert foresight_cosine(case.double().projected, *case.double().rest)[0].dtype == torch.float64  # auto


def test_explicit_choices_never_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("auto", "cpu") == choose("cpu", "cpu") == "cpu"
    assert choose("reference", "cpu") == choose("reference", "cuda") == "reference"
    for kernel, device in (("cuda", "cpu"), ("cpu", "cuda"), ("cpu", "mps")):
        with pytest.raises(ConfigError, match=rf"foresight.kernel = '{kernel}': the tensors are on {device}; use auto"):
            choose(kernel, device)
    with pytest.raises(ConfigError, match="use one of auto, cuda, cpu, reference"):
        choose("fast", "cpu")
    said: list[str] = []

    def nothing(*_: object) -> None:
        raise build.BuildError("no C++ compiler")

    monkeypatch.setattr(build, "library", nothing)
    monkeypatch.setattr(op, "_PROBLEMS", {})
    say = said.append
    with pytest.raises(ConfigError, match=r"foresight.kernel = 'cpu': no C\+\+ compiler"):
        choose("cpu", "cpu", F32, say)
    assert choose("auto", "cpu", F32, say) == "reference"
    assert choose("auto", "cpu", F32, say) == "reference"
    assert said == ["the alignment loss runs in plain PyTorch (kernel: auto), because no C++ compiler"]  # once
