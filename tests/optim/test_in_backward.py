"""Optimizers in backward, the markers, and RowWiseAdagrad."""

import pytest
import torch
from torch import nn

from recsys_edu.optim import (
    LAMB,
    SGD,
    Adam,
    RowWiseAdagrad,
    apply_optimizer_in_backward,
    in_backward_optimizer_filter,
)


@pytest.mark.parametrize(
    "optimizer, arguments",
    [(torch.optim.SGD, {"lr": 0.1}), (torch.optim.Adam, {"lr": 0.1}), (RowWiseAdagrad, {"lr": 0.1})],
)
def test_training_in_backward_equals_stepping(optimizer, arguments) -> None:
    torch.manual_seed(0)
    plain, fused = nn.EmbeddingBag(6, 4, mode="sum"), nn.EmbeddingBag(6, 4, mode="sum")
    fused.load_state_dict(plain.state_dict())
    stepper = optimizer(plain.parameters(), **arguments)
    apply_optimizer_in_backward(optimizer, fused.parameters(), arguments)
    ids = torch.tensor([[0, 1], [1, 5]])
    for _ in range(3):
        stepper.zero_grad()
        (plain(ids) ** 2).sum().backward()
        stepper.step()
        (fused(ids) ** 2).sum().backward()
        assert fused.weight.grad is None
    torch.testing.assert_close(fused.weight, plain.weight)


def test_attributes_tell_the_sharder_and_the_filter() -> None:
    model = nn.Linear(2, 2)
    apply_optimizer_in_backward(torch.optim.SGD, [model.weight, model.weight], {"lr": 0.1})
    assert model.weight._optimizer_classes == [torch.optim.SGD] and model.weight._optimizer_kwargs == [{"lr": 0.1}]
    assert [name for name, _ in in_backward_optimizer_filter(model.named_parameters())] == ["bias"]
    assert [name for name, _ in in_backward_optimizer_filter(model.named_parameters(), include=True)] == ["weight"]
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is None and model.bias.grad is not None


def test_two_optimizers_step_one_after_the_other() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    apply_optimizer_in_backward(torch.optim.SGD, [weight], {"lr": 0.5})
    apply_optimizer_in_backward(torch.optim.SGD, [weight], {"lr": 0.25})
    weight.sum().backward()
    assert weight.item() == pytest.approx(0.25)


def test_bad_arguments_attach_nothing() -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="learning rate"):
        apply_optimizer_in_backward(torch.optim.SGD, [weight], {"lr": -1.0})
    assert not hasattr(weight, "_optimizer_classes")


@pytest.mark.parametrize("marker", [LAMB, SGD, Adam])
def test_markers_say_what_they_are_when_they_would_have_to_step(marker) -> None:
    weight = nn.Parameter(torch.ones(2))
    apply_optimizer_in_backward(marker, [weight], {"lr": 0.1, "anything": 1})
    assert weight._optimizer_classes == [marker]
    with pytest.raises(NotImplementedError, match=f"{marker.__name__} only names.*DistributedModelParallel"):
        weight.sum().backward()
    assert weight.tolist() == [1, 1]


def test_rowwise_adagrad_by_hand() -> None:
    table = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    optimizer = RowWiseAdagrad([table], lr=0.5, initial_accumulator_value=1.0, lr_decay=0.5, eps=0.0)
    sums, expected = torch.ones(2, 1), table.detach().clone()
    for step in (1, 2):
        gradient = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
        table.grad = gradient.clone()
        optimizer.step()
        sums += (gradient**2).mean(dim=1, keepdim=True)
        expected -= 0.5 / (1 + (step - 1) * 0.5) * gradient / sums.sqrt()
    torch.testing.assert_close(table.detach(), expected)
    torch.testing.assert_close(optimizer.state[table]["sum"], sums)
    assert optimizer.state[table]["step"] == 2


def test_rowwise_adagrad_options_and_errors() -> None:
    up, down = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    for param, optimizer in ((up, RowWiseAdagrad([up], maximize=True)), (down, RowWiseAdagrad([down], unknown=3))):
        param.grad = torch.ones(2, 2)
        assert optimizer.step(lambda: torch.tensor(7.0)).item() == 7
    torch.testing.assert_close((up - 1).detach(), (1 - down).detach())
    decayed = nn.Parameter(torch.full((1, 2), 2.0))
    optimizer = RowWiseAdagrad([decayed], lr=0.1, weight_decay=0.5)
    decayed.grad = torch.zeros(1, 2)
    optimizer.step()
    assert decayed[0].tolist() == pytest.approx([1.9, 1.9])
    with pytest.raises(ValueError, match="Invalid lr value: -1"):
        RowWiseAdagrad([up], lr=-1)
    with pytest.raises(ValueError, match="2 or more dimensions"):
        RowWiseAdagrad([nn.Parameter(torch.ones(3))])
    up.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(RuntimeError, match="dense gradients"):
        RowWiseAdagrad([up]).step()
