"""Traffic, memory and tilings that the sharding notebooks draw are those of the engine, and drawings become plans."""

import pytest
import torch
from plotly.subplots import make_subplots

from recsys_edu.distributed.exchange import TransferRecord
from recsys_edu.distributed.sharding.tiling import validate
from recsys_edu.viz.sharding_explorer import (
    COLUMN_WISE,
    DATA_PARALLEL,
    DRAWN,
    GRID,
    ROW_WISE,
    TABLE_ROW_WISE,
    TABLE_WISE,
    TYPES,
    Setting,
    drawing_figure,
    explorer_figure,
    run_trial,
    shards_from_drawing,
)
from recsys_edu.viz.traffic import Traffic, add_traffic, bytes_text, split_figure, traffic_figure, traffic_from_logs

BATCH, POOLING, DIM = 8, 4, 16


def trial_of(kind, ranks=4, hosts=2):
    return run_trial(Setting(kind, ranks, hosts, 100, DIM, BATCH, POOLING))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("ranks, hosts", [(2, 1), (4, 2), (4, 1)])
def test_every_type_runs_and_equals_unsharded(kind, ranks, hosts):
    assert trial_of(kind, ranks, hosts).agrees


@pytest.mark.parametrize("kind, owners, returned", [(TABLE_WISE, 1, 1), (ROW_WISE, 4, 4), (COLUMN_WISE, 4, 1)])
def test_traffic_follows_the_formulas(kind, owners, returned):
    steps = trial_of(kind, 4, 1).traffic.steps
    copies = 4 if kind == COLUMN_WISE else 1
    assert steps["lengths and ids"].sum(1).tolist() == [4 * (owners * BATCH + copies * BATCH * POOLING)] * 4
    assert steps["pooled embeddings"].sum(0).tolist() == [4 * returned * BATCH * DIM] * 4


def test_host_sums_send_each_bag_between_hosts_once():
    steps = trial_of(TABLE_ROW_WISE).traffic.steps
    between = Traffic({"": steps["sums between hosts"]}, local_size=2)
    assert between.between_bytes == 4 * 2 * BATCH * DIM  # two ranks ask from the other host


def test_memory_adds_up_to_the_table():
    for kind in (ROW_WISE, TABLE_WISE, GRID):
        assert sum(parts["weights"] for parts in trial_of(kind).memory_W) == 100 * DIM * 4
    assert all(parts["weights"] == 100 * DIM * 4 for parts in trial_of(DATA_PARALLEL).memory_W)


def test_traffic_tells_stays_inside_and_between():
    bytes_WW = torch.arange(16).view(4, 4)
    traffic = Traffic({"a": bytes_WW, "b": bytes_WW}, local_size=2)
    assert traffic.stays_bytes == 2 * (0 + 5 + 10 + 15)
    assert traffic.inside_bytes == 2 * (1 + 4 + 11 + 14)
    assert traffic.stays_bytes + traffic.moved_bytes == 2 * int(bytes_WW.sum())
    assert torch.equal(traffic.step("b").bytes_WW, bytes_WW)
    with pytest.raises(KeyError, match="no exchange 'c'; there are 'a', 'b'"):
        traffic.step("c")


def test_logs_of_ranks_become_one_matrix():
    logs = [[TransferRecord("x", (1, 2)), TransferRecord("x", (1, 0))], [TransferRecord("x", (3, 4))]]
    assert traffic_from_logs(logs).steps["x"].tolist() == [[2, 2], [3, 4]]
    with pytest.raises(ValueError, match="rank 1 has no log"):
        traffic_from_logs([[], None])
    with pytest.raises(ValueError, match="cannot be divided"):
        traffic_from_logs(logs, local_size=3)


def test_a_drawing_becomes_rectangles_that_tile_and_run():
    picture = "0011\n0011\n2223"
    shards = shards_from_drawing(picture, 30, 16)
    assert [(s.rows, s.columns, s.rank) for s in shards] == [
        (range(20), range(8), 0),
        (range(20), range(8, 16), 1),
        (range(20, 30), range(12), 2),
        (range(20, 30), range(12, 16), 3),
    ]
    validate(shards, 30, 16, world_size=4, table="user")
    assert run_trial(Setting(DRAWN, 4, 2, 30, 16, 8, 4), shards).agrees


@pytest.mark.parametrize(
    "picture, message",
    [("", "empty drawing"), ("01\n0", "make them equal"), ("0!", "expected ranks"), ("00000", "at most 30 x 4")],
)
def test_a_drawing_that_cannot_be_read_says_why(picture, message):
    with pytest.raises(ValueError, match=message):
        shards_from_drawing(picture, 30, 16)


def test_what_is_wrong_becomes_a_picture():
    gap = drawing_figure("01\n.1", rows=30, dim=16)
    assert "gap" in gap.layout.annotations[0].text
    narrow = explorer_figure(COLUMN_WISE, ranks=8, hosts=3, rows=100, dim=4)
    assert "cannot cut" in narrow.layout.title.text


def test_figures_say_what_they_show():
    traffic = trial_of(GRID).traffic
    figure = traffic_figure({"grid": traffic})
    assert figure.layout.xaxis.title.text == "to rank" and figure.layout.yaxis.title.text == "from rank"
    shown = figure.data[0].z
    assert shown[0][0] is None and shown[0][2] == int(traffic.bytes_WW[0, 2])
    assert len([shape for shape in figure.layout.shapes if shape.line.width == 2.5]) == 2  # a frame per host
    assert "sent" in split_figure({"grid": traffic}).layout.xaxis.title.text
    titles = [note.text for note in explorer_figure(GRID).layout.annotations]
    assert {"who holds what", "bytes sent (grey: stays)", "memory of each rank"} <= set(titles)


def test_bytes_for_people():
    assert (bytes_text(0), bytes_text(2048), bytes_text(3 * 2**30)) == ("0 B", "2.0 KiB", "3.0 GiB")


@pytest.mark.parametrize("number, shown", [(0, "0"), (999, "999"), (1000, "1000"), (2048, "2K"), (11_500, "11K")])
def test_numbers_in_a_narrow_panel_are_short(number, shown):
    step = torch.tensor([[0, number], [0, 0]])
    figure = make_subplots(rows=1, cols=1)
    add_traffic(figure, Traffic({"answers": step}, local_size=2), {"row": 1, "col": 1}, compact=True)
    assert figure.data[0].text[0][1] == shown


def test_four_ranks_in_the_explorer_have_short_numbers():
    texts = [text for row in drawing_figure("0011\n2233", rows=1000, dim=32).data for text in _cells(row)]
    assert texts and max(map(len, texts)) <= 4


def _cells(trace):
    return [text for row in trace.text for text in row if text] if trace.type == "heatmap" else []
