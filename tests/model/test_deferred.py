"""Initial values that are computed when they are read: judged by models made plainly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from conftest import sampled

torch = pytest.importorskip("torch")

from ckptool.model import deferred  # noqa: E402

nn = torch.nn


class Reading(nn.Module):
    """What constructors do with values before a file replaces them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        nn.init.constant_(self.linear.weight, 2.0)
        self.register_buffer("twice", self.linear.weight.detach() * 2, persistent=False)
        self.linear.bias.data.fill_(3.0)
        self.linear.bias.data.mul_(2)
        self.copied = copy.deepcopy(self.linear)
        self.held = [nn.Parameter(torch.empty(3))]  # in no state_dict
        nn.init.ones_(self.held[0])
        self.alias = nn.Parameter(self.linear.bias)  # shares memory, is another object
        self.table = nn.Embedding(5, 3, padding_idx=0)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))


def test_what_is_read_or_not_replaced_has_its_values() -> None:
    with deferred.initial_values():
        model = Reading()
    assert torch.equal(model.twice, torch.full((4, 4), 4.0))
    assert torch.equal(model.linear.bias, torch.full((4,), 6.0))
    assert torch.equal(model.copied.weight, torch.full((4, 4), 2.0))
    assert torch.equal(model.held[0], torch.ones(3))
    assert torch.equal(model.alias, model.linear.bias)
    assert torch.equal(model.table.weight[0], torch.zeros(3))
    assert 0.1 < float(model.table.weight[1:].detach().abs().max()) < 6
    weights = model.normed.parametrizations.weight
    assert torch.equal(weights.original0.flatten(), weights.original1.norm(dim=1))


def test_what_a_file_replaces_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    state = nn.Linear(8, 8).state_dict()
    drawn: list[Any] = []
    original = nn.init.kaiming_uniform_
    monkeypatch.setattr(
        nn.init, "kaiming_uniform_", lambda *a, **k: drawn.append(original(*a, **k))
    )
    with deferred.initial_values():
        model = nn.Linear(8, 8)
        model.load_state_dict(state)
    assert not drawn
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with deferred.initial_values():
        part = nn.Linear(8, 8)
        part.load_state_dict({"bias": state["bias"]}, strict=False)
    assert len(drawn) == 1
    assert 0 < float(part.weight.detach().abs().max()) <= 8**-0.5
    assert torch.equal(part.bias, state["bias"])


def test_torch_is_as_before() -> None:
    before = dict(vars(nn.init))
    with pytest.raises(ValueError, match="stop"), deferred.initial_values():
        raise ValueError("stop")
    assert dict(vars(nn.init)) == before
    assert float(nn.Linear(3, 3).weight.detach().abs().max()) > 0


@pytest.mark.parametrize(
    "name", sampled(["mnasnet0_5", "googlenet", "vit_b_32", "swin_t", "maxvit_t"], 5)
)
def test_models_of_torchvision_have_all_their_values(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    with torch.device("cpu"):
        plain = models.get_model(name, weights=None, num_classes=7)
    state = plain.state_dict()
    with deferred.initial_values():
        model = models.get_model(name, weights=None, num_classes=7)
        model.load_state_dict(state)
    own = dict(model.named_buffers())
    assert all(torch.equal(value, own[key]) for key, value in plain.named_buffers())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
