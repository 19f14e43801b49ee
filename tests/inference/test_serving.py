"""The server: checked requests, batches that come apart again, real HTTP with everything that can be wrong with it."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_package import FEATURES, ROWS, float_model, quantised, scores_of

from recsys_edu.inference import serve
from recsys_edu.inference.batching import Batcher, BatchingOptions
from recsys_edu.inference.load_test import ServerProcess, ask, run_load
from recsys_edu.inference.modules import quantize_inference_model
from recsys_edu.inference.package import PackageMetadata, Trial, export_package
from recsys_edu.inference.requests import RefusedRequest, ScoringRequest, join_requests, parse_request

MODEL = PackageMetadata(
    "exported", FEATURES, ROWS, 3, "probability", "pytorch", "cpu", torch.__version__, Trial([], [], [], [])
)
GOOD = {"dense": [0.1, 0, 3.5], "ids": {"user": [4], "film": [29, 0]}}


def test_a_request_becomes_lists() -> None:
    body = json.dumps({"examples": [GOOD, {"dense": [1, 2, 3], "ids": {"film": [7]}}]}).encode()
    found = parse_request(body, MODEL, 10)
    assert found == ScoringRequest([[0.1, 0, 3.5], [1, 2, 3]], [[1, 0], [0, 0], [2, 1]], [[4], [], [29, 0, 7]])
    dense_BI, lengths_FB, values = join_requests([found, found], MODEL)
    assert dense_BI.shape == (4, 3) and lengths_FB.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [2, 1, 2, 1]]
    assert [ids.tolist() for ids in values] == [[4, 4], [], [29, 0, 7, 29, 0, 7]]
    assert dense_BI.dtype == torch.float32 and {ids.dtype for ids in values} == {torch.int64}


BAD_BODIES = [
    (b"", 400, "not JSON"),
    (b"\xff\xfe", 400, "not JSON"),
    (b"[" * 100_000, 400, "not JSON"),
    (b'{"examples": [{"dense": [' + b"1" * 5000 + b"]}]}", 400, "not JSON"),
    (b"3", 422, "examples"),
    (b'{"examples": {}}', 422, "examples"),
    (b'{"examples": [], "x": 1}', 422, r"unknown keys \['x'\]"),
    (b'{"examples": []}', 422, "0 examples; a request has 1 to 10"),
    (json.dumps({"examples": [GOOD] * 11}).encode(), 422, "11 examples"),
    (b'{"examples": [7]}', 422, r"examples\[0\]"),
    (b'{"examples": [{"dense": [1, 2]}]}', 422, r"examples\[0\]\.dense: expected a list of 3 numbers, got 2 of them"),
    (b'{"examples": [{"dense": "123"}]}', 422, "expected a list of 3 numbers, got str"),
    (b'{"examples": [{"dense": [1, NaN, 2]}]}', 422, r"dense\[1\]: NaN is no finite"),
    (b'{"examples": [{"dense": [1, 2, Infinity]}]}', 422, r"dense\[2\]: Infinity"),
    (b'{"examples": [{"dense": [1, 2, 1e39]}]}', 422, r"dense\[2\]"),
    (b'{"examples": [{"dense": [1, 2, ' + b"1" * 400 + b"]}]}", 422, r"dense\[2\]"),
    (b'{"examples": [{"dense": [1, true, 2]}]}', 422, r"dense\[1\]: true"),
    (b'{"examples": [{"dense": [1, null, 2]}]}', 422, r"dense\[1\]: null"),
    (b'{"examples": [{"dense": [1, 1, 2], "ids": [1]}]}', 422, "ids: expected an object"),
    (b'{"examples": [{"dense": [1, 1, 2], "ids": {"shop": [1]}}]}', 422, r"no features \['shop'\]; there are"),
    (b'{"examples": [{"dense": [1, 1, 2], "ids": {"film": 1}}]}', 422, "'film'.*got int"),
    (b'{"examples": [{"dense": [1, 1, 2], "ids": {"film": [30]}}]}', 422, "'film'.*30 is no id in 0 ... 29"),
    (b'{"examples": [{"dense": [1, 1, 2], "ids": {"film": [-1]}}]}', 422, "-1 is no id"),
    (b'{"examples": [{"dense": [1, 1, 2], "ids": {"film": [1.0]}}]}', 422, "1.0 is no id"),
    (b'{"examples": [{"dense": [1, 1, 2], "ids": {"film": [true]}}]}', 422, "true is no id"),
    (b'{"examples": [{"dense": [1, 1, 2], "id": {}}]}', 422, "nothing else"),
]


@pytest.mark.parametrize(("body", "status", "reason"), BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_bad_requests_are_refused_with_a_reason(body: bytes, status: int, reason: str) -> None:
    with pytest.raises(RefusedRequest, match=reason) as refused:
        parse_request(body, MODEL, 10)
    assert refused.value.status == status and len(refused.value.reason) < 300


WEIGHTED = replace(MODEL, weighted=True)


def test_weights_of_ids_come_with_the_request() -> None:
    weighted = GOOD | {"weights": {"film": [0.5, 2]}}
    found = parse_request(json.dumps({"examples": [weighted, GOOD]}).encode(), WEIGHTED, 10)
    assert found.weights == [[1, 1], [], [0.5, 2, 1, 1]]
    weights = join_requests([found, found], WEIGHTED)[3]
    assert [each.tolist() for each in weights] == [[1] * 4, [], [0.5, 2, 1, 1] * 2]
    for wrong, reason in (
        ([0.5], r"weights\['film'\]: expected one number for each of 2 ids, got 1 of them"),
        ([0.5, None], r"weights\['film'\]\[1\]: null is no finite"),
        (1, "got int"),
    ):
        body = json.dumps({"examples": [GOOD | {"weights": {"film": wrong}}]}).encode()
        with pytest.raises(RefusedRequest, match=reason):
            parse_request(body, WEIGHTED, 10)
    with pytest.raises(RefusedRequest, match="expected an object with dense and ids and nothing else"):
        parse_request(json.dumps({"examples": [weighted]}).encode(), MODEL, 10)


def of(number: float, examples: int = 1) -> ScoringRequest:
    return ScoringRequest([[number]] * examples, [], [])


def echo(requests: Sequence[ScoringRequest]) -> list[float]:
    return [row[0] for request in requests for row in request.dense]


def run_batcher(score, options: BatchingOptions, requests: Sequence[ScoringRequest]) -> tuple[list, list[int]]:
    """The answers (or refusals) of requests that come all at once, and the sizes of the batches they went in."""
    sizes: list[int] = []

    async def run() -> list:
        batcher = Batcher(score, options, lambda examples, seconds: sizes.append(examples))
        batcher.start()
        answers = await asyncio.gather(*map(batcher.submit, requests), return_exceptions=True)
        assert batcher.pending == 0 or options.timeout_s < 1
        await batcher.stop()
        return answers

    return asyncio.run(asyncio.wait_for(run(), 20)), sizes


@pytest.mark.parametrize("in_thread", [False, True])
def test_each_request_gets_its_own_scores_back(in_thread: bool) -> None:
    requests = [of(number, 1 + number % 3) for number in range(50)]
    answers, sizes = run_batcher(echo, BatchingOptions(max_batch=16, in_thread=in_thread), requests)
    assert answers == [[number] * (1 + number % 3) for number in range(50)]
    assert sum(sizes) == 99 and max(sizes) <= 16 and len(sizes) < 12


def test_a_batch_of_one_is_no_batching() -> None:
    _, sizes = run_batcher(echo, BatchingOptions(max_batch=1), [of(number) for number in range(5)])
    assert sizes == [1] * 5


def test_clients_that_ask_again_share_a_batch() -> None:
    async def run() -> list[int]:
        sizes: list[int] = []
        batcher = Batcher(echo, BatchingOptions(max_batch=16), lambda examples, seconds: sizes.append(examples))
        batcher.start()

        async def client(number: int) -> None:
            for turn in range(5):
                for _ in range(number % 2):  # a request is read, its task started: not all arrive in one round
                    await asyncio.sleep(0)
                assert await batcher.submit(of(number + turn)) == [number + turn]

        await asyncio.gather(*map(client, range(8)))
        await batcher.stop()
        return sizes

    assert asyncio.run(asyncio.wait_for(run(), 20)) == [8] * 5


def test_who_keeps_coming_does_not_hold_up_a_full_batch() -> None:
    answers, sizes = run_batcher(echo, BatchingOptions(max_batch=4), [of(number, 3) for number in range(4)])
    assert answers == [[number] * 3 for number in range(4)] and sizes == [3] * 4


def test_a_client_that_went_leaves_no_gap() -> None:
    async def run() -> list:
        batcher = Batcher(echo, BatchingOptions())
        batcher.start()
        tasks = [asyncio.create_task(batcher.submit(of(number))) for number in range(4)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert batcher.pending == 0
        await batcher.stop()
        return answers

    answers = asyncio.run(asyncio.wait_for(run(), 20))
    assert [answers[0], *answers[2:]] == [[0], [2], [3]] and isinstance(answers[1], asyncio.CancelledError)


def test_a_failing_request_fails_alone() -> None:
    def picky(requests: Sequence[ScoringRequest]) -> list[float]:
        if any(row[0] == 3 for request in requests for row in request.dense):
            raise RuntimeError("three")
        return echo(requests)

    answers, _ = run_batcher(picky, BatchingOptions(), [of(number) for number in range(6)])
    assert [answers[number] for number in (0, 1, 2, 4, 5)] == [[0], [1], [2], [4], [5]]
    assert answers[3].status == 500 and "RuntimeError" in answers[3].reason and "three" not in answers[3].reason


def test_a_full_queue_refuses_at_once_and_recovers() -> None:
    answers, _ = run_batcher(echo, BatchingOptions(max_batch=2, max_pending=4), [of(number) for number in range(9)])
    assert answers[:4] == [[0], [1], [2], [3]]
    assert {answer.status for answer in answers[4:]} == {429} and "4 examples wait" in answers[4].reason


def test_a_request_that_takes_too_long_is_given_up() -> None:
    def slow(requests: Sequence[ScoringRequest]) -> list[float]:
        time.sleep(0.3)
        return echo(requests)

    answers, _ = run_batcher(slow, BatchingOptions(max_batch=1, timeout_s=0.1, in_thread=True), [of(0), of(1)])
    assert [answer.status for answer in answers] == [503, 503] and "0.1 s" in answers[0].reason


def test_options_that_make_no_sense() -> None:
    for wrong in ({"max_batch": 0}, {"max_batch": 8, "max_pending": 4}, {"wait_ms": -1}, {"timeout_s": 0}):
        with pytest.raises(ValueError, match="expected max_batch >= 1"):
            BatchingOptions(**wrong)


# ---- the real thing: a process, a port, HTTP ------------------------------------------------------------------------

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "film.pt2"
    export_package(quantised(), path, num_dense=3, kernels="pytorch")
    return path


@pytest.fixture(scope="module")
def url(package: Path) -> Iterator[str]:
    with ServerProcess(package, "--threads", "1", "--max-batch", "32", "--timeout-s", "5") as server:
        yield server.url


def expected_score(example: dict) -> float:
    values = [torch.tensor(example["ids"].get(name, []), dtype=torch.int64) for name in FEATURES]
    lengths_FB = torch.tensor([[len(ids)] for ids in values])
    return float(scores_of(quantised(), torch.tensor([example["dense"]]).float(), lengths_FB, values))


def test_scores_are_the_models(url: str) -> None:
    assert url.startswith("http://127.0.0.1:")
    other = {"dense": [0.5, 0.5, 0.5], "ids": {"friend": [1, 2, 3]}}
    status, answer = ask(url, "/predict", {"examples": [GOOD, other]})
    assert status == 200
    assert answer["scores"] == pytest.approx([expected_score(GOOD), expected_score(other)], abs=1e-5)


def test_a_weighted_model_over_http(tmp_path: Path) -> None:
    model = quantize_inference_model(float_model(weighted=True))
    export_package(model, tmp_path / "w.pt2", num_dense=3, kernels="pytorch")
    example = GOOD | {"weights": {"film": [0.5, 2.0]}}
    with ServerProcess(tmp_path / "w.pt2", "--threads", "1") as server:
        address = server.url
        assert ask(address)[1]["weighted"]
        status, answer = ask(address, "/predict", {"examples": [example]})
    lengths_FB, values = (
        torch.tensor([[1], [0], [2]]),
        [torch.tensor([4]), torch.tensor([]).long(), torch.tensor([29, 0])],
    )
    weights = [torch.ones(1), torch.ones(0), torch.tensor([0.5, 2.0])]
    expected = scores_of(model, torch.tensor([GOOD["dense"]]), lengths_FB, values, weights)
    assert status == 200 and answer["scores"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_many_clients_get_their_own_scores(url: str) -> None:
    examples = [{"dense": [0.1, 0.2, 0.3], "ids": {"user": [number], "film": [number % 30]}} for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda example: ask(url, "/predict", {"examples": [example]}), examples))
    found = [answer["scores"][0] for _, answer in answers]
    assert found == pytest.approx([expected_score(example) for example in examples], abs=1e-5)


def test_health_and_metrics(url: str) -> None:
    status, health = ask(url)
    assert status == 200 and health["status"] == "ok"
    assert health["features"] == dict(zip(FEATURES, ROWS)) and health["num_dense"] == 3
    before = _metric(url, 'requests_total{status="200"}')
    ask(url, "/predict", {"examples": [GOOD]})
    assert _metric(url, 'requests_total{status="200"}') == before + 1
    assert _metric(url, "batch_examples_sum") >= 1 and _metric(url, "pending_examples") == 0


def _metric(url: str, name: str) -> float:
    status, text = ask(url, "/metrics")
    assert status == 200
    return float(next((line.split()[-1] for line in text.splitlines() if line.startswith(f"{name} ")), 0))


@pytest.mark.parametrize(
    ("path", "content", "status", "reason"),
    [
        ("/predict", b"{", 400, "not JSON"),
        ("/predict", {"examples": [{"dense": [1, 2, 3], "ids": {"film": [30]}}]}, 422, "0 ... 29"),
        ("/predict", {"examples": [GOOD] * 33}, 422, "1 to 32"),
        ("/predict", b" " * (serve.MAX_BODY_BYTES + 1), 413, "at most"),
        ("/predict", None, 405, "Method Not Allowed"),
        ("/nothing", None, 404, "Not Found"),
    ],
)
def test_wrong_requests_over_http(url: str, path: str, content, status: int, reason: str) -> None:
    found, answer = ask(url, path, content)
    assert found == status and reason in answer["error"]
    assert ask(url)[0] == 200


def test_broken_connections_do_no_harm(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    for garbage in (b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", head + b"{", b""):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(garbage)
    status, answer = ask(url, "/predict", {"examples": [GOOD]})
    assert status == 200 and len(answer["scores"]) == 1


def test_overload_is_refused_and_passes(package: Path) -> None:
    with ServerProcess(package, "--threads", "1", "--max-batch", "1", "--max-pending", "1") as server:
        address = server.url
        result = run_load(address, [{"examples": [GOOD]}], clients=16, seconds=0.7)
        assert set(result.statuses) == {200, 429} and min(result.statuses.values()) > 0
        assert ask(address)[0] == 200 and ask(address, "/predict", {"examples": [GOOD]})[0] == 200


def test_what_cannot_be_served_says_why(tmp_path: Path, package: Path, capsys: pytest.CaptureFixture) -> None:
    assert serve.main([str(tmp_path / "none.pt2")]) == 2
    assert "none.pt2 does not exist" in capsys.readouterr().err
    (tmp_path / "half.pt2").write_bytes(package.read_bytes()[:1000])
    assert serve.main([str(tmp_path / "half.pt2")]) == 2
    assert "damaged" in capsys.readouterr().err
    assert serve.main([str(package), "--max-batch", "0"]) == 2
    assert "max_batch" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert serve.main([str(package), "--port", str(taken.getsockname()[1])]) == 2
    assert "serve:" in capsys.readouterr().err
    with (
        ServerProcess(tmp_path / "none.pt2") as server,
        pytest.raises(RuntimeError, match=r"did not start.*does not exist"),
    ):
        _ = server.url


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without asking it")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_it_stops_when_told_to_with_one_line(package: Path, name: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "recsys_edu.inference.serve", str(package), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().split()[-1]
            assert ask(address, "/predict", {"examples": [GOOD]})[0] == 200
            process.send_signal(getattr(signal, name))
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (out, err, process.returncode) == ("film.pt2 is no longer served\n", "", 0)


def test_it_listens_on_this_machine_alone_by_default() -> None:
    assert serve.parse_arguments(["film.pt2"]).host == "127.0.0.1"
