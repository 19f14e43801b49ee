"""Timelines: spans found in a profile, transfers matched to what started them, overlap, traces, figures."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from pipeline_cases import CPU, make_batches, make_model

from recsys_edu.distributed import spans
from recsys_edu.distributed.exchange import Transfer
from recsys_edu.distributed.slow_link import SlowLink, slow_link
from recsys_edu.distributed.timeline import (
    HOST,
    NETWORK,
    Overlap,
    Span,
    Timeline,
    merge,
    record_timeline,
    timeline_of_events,
)
from recsys_edu.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from recsys_edu.viz.timeline import COLOURS, innermost, kind_of, side_by_side, timeline_figure

ZERO = 1_700_000_000_000_000_000
DELAY_MS = 30.0


@dataclass
class FakeEvent:
    """As much of a Kineto event as is read; times in milliseconds."""

    label: str
    start: float
    duration: float
    device: str = "DeviceType.CPU"
    stream: int = 0

    def name(self) -> str:
        return self.label

    def start_ns(self) -> int:
        return ZERO + int(self.start * 1e6)

    def duration_ns(self) -> int:
        return int(self.duration * 1e6)

    def device_type(self) -> str:
        return self.device

    def device_resource_id(self) -> int:
        return self.stream


def test_transfers_get_names_bytes_and_the_links_delay() -> None:
    events = [
        FakeEvent("forward", 0, 30),
        FakeEvent("aten::mm", 1, 2),
        FakeEvent("start sizes | 64 bytes", 2, 1),
        FakeEvent("gloo:all_to_all", 2.5, 4),
        FakeEvent("slow link | 20.0 ms", 10, 2),
        FakeEvent("start pooled embeddings | 800 bytes", 10.5, 1),
        FakeEvent("gloo:all_to_all", 11, 5),
        FakeEvent("wait pooled embeddings", 25, 5),
        FakeEvent("gloo:all_reduce", 3, 1),
        FakeEvent("start lengths and ids | 8 bytes", 28, 1),  # not here yet when the recording ended
    ]
    timeline = timeline_of_events(events, rank=3)
    assert timeline.zero_ns == ZERO and timeline.ranks == [3]
    network = {span.name: span for span in timeline.spans if span.stream == NETWORK}
    assert set(network) == {"sizes", "pooled embeddings", "gloo:all_reduce"}
    assert (network["sizes"].start_ms, network["sizes"].end_ms, network["sizes"].num_bytes) == (2, 6.5, 64)
    assert (network["pooled embeddings"].start_ms, network["pooled embeddings"].end_ms) == (10.5, 30.5)
    depth = {span.name: span.depth for span in timeline.spans if span.stream == HOST}
    assert depth["forward"] == 0 and depth["wait pooled embeddings"] == 1 and "aten::mm" not in depth
    # 4.5 + 20 ms in flight, of which the host waited from 25 to 30; the all-reduce does not count
    assert timeline.overlap() == Overlap(24.5, 5.0)
    assert "19.5 ms hidden (80 %)" in str(timeline.overlap())


def test_kernels_run_together_and_copies_keep_their_names() -> None:
    gpu = "DeviceType.CUDA"
    events = [
        FakeEvent("forward", 0, 5),
        FakeEvent("forward", 0, 5, gpu, 7),  # the profiler mirrors our spans
        FakeEvent("gemm_1", 1, 1, gpu, 7),
        FakeEvent("gemm_2", 2.01, 1, gpu, 7),
        FakeEvent("gemm_3", 4, 1, gpu, 7),
        FakeEvent("Memcpy HtoD (Pinned -> Device)", 0, 2, gpu, 20),
        FakeEvent("ncclDevKernel_SendRecv(args)", 1, 2, gpu, 30),
    ]
    found = [(s.stream, s.name, s.start_ms, round(s.end_ms, 3)) for s in timeline_of_events(events, 0).spans]
    assert ("GPU stream 7", "kernels", 1, 3.01) in found and ("GPU stream 7", "kernels", 4, 5) in found
    assert ("GPU stream 20", "Memcpy HtoD (Pinned -> Device)", 0, 2) in found
    assert (NETWORK, "ncclDevKernel_SendRecv", 1, 3) in found
    assert len(found) == 5


def test_ranks_are_merged_on_one_clock() -> None:
    first = Timeline((Span(0, HOST, "forward", 0, 4),), ZERO + 3_000_000)
    second = Timeline((Span(1, HOST, "forward", 0, 4),), ZERO)
    assert [(s.rank, s.start_ms) for s in merge([first, second]).spans] == [(1, 0), (0, 3)]
    assert merge([]).spans == () and timeline_of_events([FakeEvent("aten::mm", 0, 1)], 0).spans == ()


def test_steps_need_two_optimizers() -> None:
    with pytest.raises(ValueError, match="two recorded steps"):
        Timeline((Span(0, HOST, "optimizer", 0, 1),)).step_ms()
    spans_ = tuple(Span(rank, HOST, "optimizer", 10 * step + rank, 1) for rank in (0, 1) for step in range(3))
    assert Timeline(spans_).step_ms() == 10


def test_spans_cost_no_object_where_nobody_profiles() -> None:
    assert spans.span("a") is spans.span("b", 3)
    with torch.profiler.profile():
        assert spans.span("a") is not spans.span("a")


def recorded(rank: int, world_size: int, group, kind: str) -> tuple[Timeline, list[tuple[str, int]]]:
    model, optimizer = make_model("dlrm", world_size)
    pipeline = {"base": TrainPipelineBase, "sparse": TrainPipelineSparseDist}[kind](model, optimizer, CPU)
    batches = iter(make_batches(rank, 12, batch_size=64))
    exchange = model.module.model.sparse_arch.embedding_bag_collection.shards.exchange
    with slow_link(model, DELAY_MS):
        for _ in range(3):
            pipeline.progress(batches)
        exchange.log = []
        timeline = record_timeline(lambda: [pipeline.progress(batches) for _ in range(3)])
        log = [(record.label, record.total_bytes) for record in exchange.log]
        exchange.log = None
    pipeline.progress(batches)
    return timeline, log


@pytest.mark.parametrize("kind", ["base", "sparse"])
def test_real_ranks_are_recorded(ranks, kind: str, tmp_path) -> None:
    found = ranks.run(recorded, 2, kind)
    whole = merge(timeline for timeline, _ in found)
    for rank, (timeline, log) in enumerate(found):
        mine = whole.of(rank)
        names = {span.name for span in mine.spans}
        assert {"load batch", "copy batch", "forward", "lookup", "output_dist", "backward", "optimizer"} <= names
        assert {"start input", "exchange input"} <= names or kind == "base"
        started = [(s.name.removeprefix("start "), s.num_bytes) for s in mine.spans if s.name.startswith("start ")]
        assert [item for item in started if item[0] != "input"] == log
        waits = [span for span in mine.spans if span.name.startswith("wait ")]
        assert len(log) - 2 <= len(waits) <= len(log) + 2  # one each, whatever part of it the link's delay takes
        assert all(late.start_ms >= early.end_ms for early, late in pairwise(waits))
        transfers = [span for span in mine.spans if span.stream == NETWORK and span.name != "gloo:all_reduce"]
        assert len(log) - 2 <= len(transfers) <= len(log)
        assert all(span.duration_ms >= 0.99 * DELAY_MS for span in transfers)
        assert any(span.name == "gloo:all_reduce" for span in mine.spans)
        assert [span for span in timeline.spans if span.depth == 0 and span.name == "lookup"] == []
    overlap = whole.overlap()
    assert overlap.in_flight_ms > 2 * 3 * DELAY_MS and 0 <= overlap.hidden_percent <= 100

    frame = whole.frame()
    assert frame.columns == ["rank", "stream", "name", "start_ms", "duration_ms", "bytes", "depth"]
    assert len(frame) == len(whole.spans)
    events = json.loads(whole.save(tmp_path / "trace.json").read_text())["traceEvents"]
    assert len([event for event in events if event["ph"] == "X"]) == len(whole.spans)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    assert {"rank 0", "rank 1", HOST, NETWORK} == {event["args"]["name"] for event in events if event["ph"] == "M"}


def test_the_link_is_fast_again_afterwards() -> None:
    model, _ = make_model("dlrm", 1)
    exchange = model.module.model.sparse_arch.embedding_bag_collection.shards.exchange
    before = exchange.start
    with slow_link(model, 5.0):
        assert exchange.start != before
    assert exchange.start == before and "start" not in vars(exchange)


@pytest.mark.parametrize("already", [0.0, 60.0])
def test_a_wait_on_a_slow_link_is_one_wait(already: float) -> None:
    class Exchange:
        def start(self, send: torch.Tensor, *_: object) -> Transfer:
            def finish() -> None:
                with spans.span("wait", "sizes"):
                    time.sleep(0.010)

            return Transfer(send, finish)

    link = SlowLink(Exchange(), 40.0)

    def run() -> None:
        transfer = link.start(torch.ones(1), [1], [1], "sizes")
        time.sleep(already / 1e3)
        transfer.wait()

    (wait,) = [span for span in record_timeline(run, rank=0).spans if span.stream == HOST]
    assert wait.name == "wait sizes" and wait.depth == 0
    assert wait.duration_ms >= (9.9 if already else 39)  # the exchange's own time and the rest of the delay


def order_of_output(rank: int, world_size: int, group) -> list[str]:
    model, _ = make_model("dlrm", world_size)
    dlrm, seen = model.module.model, []
    dlrm.dense_arch.register_forward_pre_hook(lambda *_: seen.append("bottom MLP"))
    dlrm.inter_arch.register_forward_pre_hook(lambda *_: seen.append("interaction"))
    timeline = record_timeline(lambda: _noting_waits(dlrm, seen, lambda: model(make_batches(rank, 1, last=None)[0])))
    assert any(span.name == "wait pooled embeddings" for span in timeline.spans)
    return seen


def _noting_waits(dlrm, seen: list[str], run) -> None:
    collection = dlrm.sparse_arch.embedding_bag_collection
    finish = collection.finish
    collection.finish = lambda flight: (seen.append("wait for embeddings"), finish(flight))[1]
    run()


def test_dlrm_computes_its_bottom_mlp_while_embeddings_travel(ranks) -> None:
    assert ranks.run(order_of_output, 2) == [["bottom MLP", "wait for embeddings", "interaction"]] * 2


def test_the_figure_shows_every_rank_and_kind() -> None:
    pytest.importorskip("plotly")
    host = [
        Span(0, HOST, "forward", 0, 10),
        Span(0, HOST, "lookup", 2, 6, depth=1),
        Span(0, HOST, "wait lengths and ids", 3, 2, depth=2),
        Span(1, HOST, "backward", 0, 9),
    ]
    network = [Span(0, NETWORK, "lengths and ids", 1, 4, 100), Span(0, NETWORK, "gloo:all_reduce", 2, 9)]
    timeline = Timeline((*host, *network))
    figure = timeline_figure({"one": timeline, "two": timeline})
    assert {bar.name for bar in figure.data} == {
        "forward", "lookup", "waiting", "backward", "input_dist", "DDP's all-reduce",
    }  # fmt: skip
    assert sum(bool(bar.showlegend) for bar in figure.data) == 6
    assert figure.layout.yaxis.ticktext == ("rank 0 host", "rank 0 network", "", "rank 1 host")
    assert figure.layout.annotations[0].text.startswith("one: in flight 4.0 ms, waited for 2.0 ms")
    hover = [text for bar in figure.data for text in bar.customdata]
    assert any("100 bytes" in text for text in hover)


def test_pieces_and_lines_do_not_overlap() -> None:
    host = [Span(0, HOST, "forward", 0, 10), Span(0, HOST, "lookup", 2, 6, depth=1), Span(0, HOST, "x", 3, 2, depth=2)]
    pieces = innermost(host)
    assert [(p.name, p.start_ms, p.end_ms) for p in pieces] == [
        ("forward", 0, 2), ("lookup", 2, 3), ("x", 3, 5), ("lookup", 5, 8), ("forward", 8, 10),
    ]  # fmt: skip
    lines = side_by_side([Span(0, NETWORK, name, start, 4) for name, start in zip("abcd", (0, 2, 4, 5))])
    assert [[span.name for span in line] for line in lines] == [["a", "c"], ["b"], ["d"]]


@pytest.mark.parametrize(
    ("stream", "name", "kind"),
    [
        (HOST, "start gradients of pooled embeddings", "gradient_dist"),
        (HOST, "start input", "input_dist"),
        (NETWORK, "sequence embeddings", "output_dist"),
        (NETWORK, "gradients of weights", "gradient_dist"),
        ("GPU stream 7", "Memcpy HtoD", "load and copy"),
        (HOST, "something", "other"),
    ],
)
def test_kinds(stream: str, name: str, kind: str) -> None:
    assert kind_of(Span(0, stream, name, 0, 1)) == kind and kind in COLOURS
