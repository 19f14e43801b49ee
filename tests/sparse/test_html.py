"""What the notebook shows: every row and its cells, cuts with counts, names escaped."""

from __future__ import annotations

import re

import pytest
import torch

from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor


def cells(html: str) -> list[str]:
    return re.findall(r'class="cell"[^>]*>([^<]*)', html)


def test_rows_and_empty_rows_are_shown():
    html = JaggedTensor(torch.tensor([5, 6, 7]), lengths=torch.tensor([2, 0, 1]))._repr_html_()
    assert cells(html) == ["5", "6", "7"]
    assert html.count('class="row"') == 3
    assert html.count(">empty<") == 1
    assert "3 rows, 3 values" in html


def test_keys_weights_and_stride_are_shown_and_names_escaped():
    kjt = KeyedJaggedTensor(
        ["a", "<script>alert(1)</script>"], torch.tensor([5, 6]), torch.tensor([0.5, 0.25]), torch.tensor([1, 1])
    )
    html = kjt._repr_html_()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "&times;0.5" in html and "&times;0.25" in html
    assert "stride 1 (rows per key)" in html
    assert "<script" not in KeyedTensor(["<script>"], [1], torch.ones(1, 1))._repr_html_()


def test_variable_stride_is_stated():
    kjt = KeyedJaggedTensor(
        ["a", "b"], torch.arange(3), lengths=torch.tensor([1, 0, 2]), stride_per_key_per_rank=[[1, 1], [1, 0]]
    )
    html = kjt._repr_html_()
    assert "variable stride per key" in html
    assert "1 value in 2 rows, by rank [1, 1]" in html


def test_long_data_are_cut_and_the_cut_is_counted():
    long_row = JaggedTensor(torch.arange(20), lengths=torch.tensor([20]))._repr_html_()
    assert len(cells(long_row)) == 12
    assert "8 more values" in long_row
    assert "32 more rows" in JaggedTensor(torch.arange(40), lengths=torch.ones(40, dtype=torch.long))._repr_html_()
    many = KeyedJaggedTensor(
        [f"f{i}" for i in range(500)], torch.arange(500), lengths=torch.ones(500, dtype=torch.long)
    )
    assert "492 more keys" in many._repr_html_()
    wide = KeyedTensor(["a", "b"], [1, 64], torch.zeros(10, 65))._repr_html_()
    assert "+58" in wide
    assert "2 more rows" in wide
    assert len(many._repr_html_()) < 20_000


@pytest.mark.parametrize(
    "instance",
    [
        KeyedJaggedTensor.empty(),
        JaggedTensor.empty(is_weighted=True),
        JaggedTensor(torch.ones(2, 5), lengths=torch.tensor([2])),
        JaggedTensor(torch.ones(2), lengths=torch.tensor([2])).to(torch.device("meta")),
        KeyedJaggedTensor(["a"], torch.ones(2), lengths=torch.tensor([2])).to(torch.device("meta")),
        KeyedTensor([], [], torch.empty(0)),
        KeyedTensor(["a"], [2], torch.ones(2), key_dim=0),
        KeyedTensor(["a"], [2], torch.ones(1, 2, device="meta")),
    ],
    ids=repr,
)
def test_every_shape_can_be_drawn(instance):
    assert type(instance).__name__ in instance._repr_html_()
