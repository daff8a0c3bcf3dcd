"""Permuted weights come back bit by bit, whatever refers to them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from saliency.known_nets import bits, in_pieces, net_of
from saliency.small_nets import rand
from torch import Tensor, nn

from lightning_robust.saliency.permutation import permuted


class Tied(nn.Module):
    """A decoder that shares the encoder's weight, and a second view of the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.decoder.weight = self.encoder.weight
        self.alias = nn.Parameter(torch.zeros(0))
        self.alias.data = self.encoder.weight.data.view(-1)
        self.norm = nn.BatchNorm1d(6)
        self.coarse = nn.Parameter(torch.randn(7).to(torch.bfloat16))
        self.frozen = nn.Parameter(torch.randn(3, 4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.norm(self.encoder(x)))
        return out


@pytest.mark.parametrize("make", [net_of, Tied])
def test_every_entry_of_a_parameter_moves_and_all_bits_come_back(make: Callable[[], nn.Module]) -> None:
    module = make()
    next(module.parameters()).data.view(-1)[:3] = torch.tensor([-0.0, torch.nan, torch.inf])
    before = bits(module)
    with permuted(module):
        inside = bits(module)
        for name, value in module.state_dict().items():
            if value.ndim and value.dtype == torch.float32:
                original = torch.frombuffer(bytearray(before[name]), dtype=torch.float32)
                # The same entries in another order; numpy-like sorting puts NaN last.
                assert torch.equal(value.flatten().sort().values.nan_to_num(9), original.sort().values.nan_to_num(9))
        assert inside != before
    assert bits(module) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_no_trace(error: type[BaseException]) -> None:
    module = Tied()
    before = bits(module)

    def broken() -> None:
        with permuted(module):
            raise error("in the middle")

    with pytest.raises(error):
        broken()
    assert bits(module) == before


def test_a_shared_weight_is_permuted_once_and_for_all() -> None:
    module = Tied()
    alone = copy.deepcopy(module.encoder)
    before = module.encoder.weight.detach().clone()
    with permuted(module, only="encoder"):
        assert module.decoder.weight is module.encoder.weight
        assert not torch.equal(module.decoder.weight, before)
        inside = module.encoder.weight.detach().clone()
    other = nn.ModuleDict({"encoder": alone})
    with permuted(other):
        assert torch.equal(alone.weight, inside)  # the order is a function of seed and name


def test_the_order_depends_on_the_seed_and_on_the_name() -> None:
    module = nn.ModuleDict({"a": nn.Linear(9, 9), "b": nn.Linear(9, 9)})
    module["b"].load_state_dict(module["a"].state_dict())
    found = []
    for seed in (0, 0, 1):
        with permuted(module, seed):
            found.append([module[name].weight.detach().clone() for name in "ab"])
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[0][0], found[0][1])


def test_only_the_named_submodules_are_permuted_with_all_they_contain() -> None:
    module = nn.ModuleDict({"a": nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), "b": nn.Linear(9, 9)})
    before = bits(module)

    def changed(*only: str) -> set[str]:
        with permuted(module, only=only):
            inside = bits(module)
        return {name.rpartition(".")[0] for name, value in inside.items() if value != before[name]}

    assert changed("a") == {"a.0", "a.1"}
    assert changed("a.1", "b") == {"a.1", "b"}
    assert changed("") == {"a.0", "a.1", "b"}
    assert changed() == set()


def test_entries_that_are_all_equal_and_buffers_stay_as_they_are() -> None:
    module = nn.BatchNorm1d(8)
    module.running_mean = torch.arange(8.0)
    before = bits(module)
    with permuted(module):
        assert bits(module) == before


def test_a_graph_that_saved_the_weights_stays_valid() -> None:
    net = nn.Linear(4, 2)
    hidden = net(torch.ones(1, 4, requires_grad=True)).exp().sum()
    with permuted(net):
        pass
    hidden.backward()  # in-place changes of what it saved would be an error
    assert net.weight.grad is not None


def test_weights_made_in_inference_mode_come_back_too() -> None:
    with torch.inference_mode():
        module = nn.Linear(8, 8)
    for inside in (True, False):
        before = bits(module)
        with torch.inference_mode(inside):
            with permuted(module):
                assert bits(module) != before
            assert bits(module) == before


def test_ordinary_weights_are_permuted_in_inference_mode_too_and_can_be_trained_afterwards() -> None:
    module = net_of()
    before = bits(module)
    with torch.inference_mode(), permuted(module):
        assert bits(module) != before
    assert bits(module) == before
    module(rand(2, 1, 8, 8)).sum().backward()


def test_an_unknown_submodule_is_named_with_the_nearest() -> None:
    with (
        pytest.raises(ValueError, match=r"has none named 'clasifier'\. Did you mean 'classifier'"),
        permuted(nn.ModuleDict({"classifier": nn.Linear(2, 2)}), only="clasifier"),
    ):
        pass


def test_weights_in_pieces_are_refused_before_anything_is_touched() -> None:
    module = in_pieces()
    before = bits(module)
    refused = pytest.raises(RuntimeError, match=r"1.weight of Sequential lies in pieces .* \(DTensor\).*in one process")
    with refused, permuted(module):
        pass
    assert bits(module) == before
    with permuted(module, only="0"):  # these are whole
        pass


def test_weights_that_are_not_yet_initialised_are_refused() -> None:
    refused = pytest.raises(RuntimeError, match=r"'weight' has no values yet\. Run the module on one batch")
    with refused, permuted(nn.LazyLinear(3)):
        pass
