"""Serve a packaged model over HTTP: JSON in, scores out, requests batched as they come.

    recsys_edu serve film.pt2 --port 8000                       (or: python -m recsys_edu.inference.serve film.pt2)
    curl localhost:8000/predict -d '{"examples": [{"dense": [0.1, 0.7, 0.2], "ids": {"user": [196]}}]}'

    POST /predict    {"scores": [...]}, or 4xx and 5xx with {"error": reason}
    GET  /health     the model's features and sizes; 503 once it cannot answer
    GET  /metrics    counts and times for Prometheus

Built on Starlette and uvicorn, the ASGI pair under FastAPI, with batching.py in between. LitServe was tried: an empty
model took 1.4 ms a request there and 0.3 ms here (requests go through queues between processes, which a model of a
millisecond does not earn back), one bad request fails its whole batch, and its queue has no bound. Ray Serve brings a
cluster's scheduler along.

It listens on this machine alone unless `--host` says otherwise; it knows no passwords and no TLS, so put a proxy in
front of it before others can reach it. `pip install 'recsys_edu[serve]'` brings what it needs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from recsys_edu.inference.archive import PackageError
from recsys_edu.inference.batching import Batcher, BatchingOptions
from recsys_edu.inference.package import Package, load_package
from recsys_edu.inference.requests import RefusedRequest, ScoringRequest, join_requests, parse_request

MAX_BODY_BYTES = 4 * 2**20
MAX_CONNECTIONS = 2048
LOOPBACK = "127.0.0.1"
LATENCY_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
INSTALL = "pip install 'recsys_edu[serve]'"


class Metrics:
    """What /metrics tells, in a registry of its own."""

    def __init__(self) -> None:
        import prometheus_client as prometheus

        self.registry = prometheus.CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = prometheus.Counter("requests", "Requests by HTTP status.", ["status"], **own)
        self.latency = prometheus.Histogram(
            "request_seconds", "From a request's last byte to its answer.", buckets=LATENCY_BUCKETS_S, **own
        )
        self.model = prometheus.Histogram(
            "model_seconds", "One batch through the model.", buckets=LATENCY_BUCKETS_S, **own
        )
        self.batches = prometheus.Histogram("batch_examples", "Examples per batch.", buckets=BATCH_BUCKETS, **own)
        self.pending = prometheus.Gauge("pending_examples", "Examples that wait for the model.", **own)

    def observe_batch(self, examples: int, seconds: float) -> None:
        self.batches.observe(examples)
        self.model.observe(seconds)

    def text(self, pending: int) -> bytes:
        import prometheus_client as prometheus

        self.pending.set(pending)
        return prometheus.generate_latest(self.registry)


def make_app(package: Package, options: BatchingOptions) -> Any:
    """The Starlette application that serves a loaded package.

    Raises:
        ImportError: the extra `serve` is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route

        metrics = Metrics()
    except ImportError as error:
        raise ImportError(f"the server needs Starlette, uvicorn and prometheus-client ({error}): {INSTALL}") from error
    model = package.metadata

    def score(requests: Sequence[ScoringRequest]) -> list[float]:
        return package.predict(*join_requests(requests, model)).tolist()

    batcher = Batcher(score, options, metrics.observe_batch)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()

    async def predict(request: Request) -> JSONResponse:
        start = None
        try:
            body = await _body_of(request, options.timeout_s)
            start = time.perf_counter()
            answer, status = {"scores": await batcher.submit(parse_request(body, model, options.max_batch))}, 200
        except RefusedRequest as refused:
            answer, status = {"error": refused.reason}, refused.status
        if start is not None:
            metrics.latency.observe(time.perf_counter() - start)
        metrics.requests.labels(status).inc()
        return JSONResponse(answer, status, {"Retry-After": "1"} if status in (429, 503) else None)

    async def health(request: Request) -> JSONResponse:
        about = {"features": dict(zip(model.features, model.num_rows)), "num_dense": model.num_dense}
        about |= {"weighted": model.weighted, "score": model.score, "kind": model.kind, "max_batch": options.max_batch}
        return JSONResponse({"status": "ok" if batcher.alive else "stopped", **about}, 200 if batcher.alive else 503)

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.text(batcher.pending), media_type="text/plain; version=0.0.4")

    async def http_error(request: Request, error: Any) -> JSONResponse:
        return JSONResponse({"error": f"{request.method} {request.url.path}: {error.detail}"}, error.status_code)

    routes = [
        Route("/predict", predict, methods=["POST"]),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", show_metrics, methods=["GET"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: http_error, 405: http_error})


async def _body_of(request: Any, timeout_s: float) -> bytes:
    """The body, as long as it is neither too large nor too slow."""
    from starlette.requests import ClientDisconnect

    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise RefusedRequest(413, f"a body has at most {MAX_BODY_BYTES} bytes")
    except TimeoutError:
        raise RefusedRequest(408, f"the body did not arrive within {timeout_s:g} s") from None
    except ClientDisconnect:
        raise RefusedRequest(400, "the client went before its body had arrived") from None
    return bytes(body)


async def run_server(app: Any, host: str, port: int, announce: str) -> None:
    """Listen until Ctrl-C or SIGTERM; print the address once requests are answered. Port 0 takes a free one.

    Raises:
        OSError: the address is taken, or none of this machine's.
    """
    import uvicorn

    listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    # Head and body of an answer go out one by one; without this the body waits 40 ms for the head's acknowledgement
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, proxy_headers=False, limit_concurrency=MAX_CONNECTIONS
    )
    server = uvicorn.Server(config)
    task = asyncio.get_running_loop().create_task(server.serve(sockets=[listener]))
    while not server.started and not task.done():
        await asyncio.sleep(0.01)
    if server.started:
        gc.freeze()  # what is loaded stays: a full collection would go through 330,000 objects, 150 ms, again and again
        shown = f"[{host}]" if ":" in host else host
        print(f"{announce} http://{shown}:{listener.getsockname()[1]}", flush=True)
    await task


def _fastest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed (not on Windows); None is asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    default = BatchingOptions()
    parser = argparse.ArgumentParser(prog="recsys_edu serve", description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="what export_package or compile_package wrote")
    parser.add_argument("--host", default=LOOPBACK, help="default: this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--max-batch", type=int, default=default.max_batch, help="examples; 1: no batching")
    parser.add_argument("--wait-ms", type=float, default=default.wait_ms, help="a batch waits for company")
    parser.add_argument("--max-pending", type=int, default=default.max_pending, help="examples that may wait")
    parser.add_argument("--timeout-s", type=float, default=default.timeout_s, help="a request is given up then")
    parser.add_argument("--in-thread", action="store_true", help="for slow models: /health is answered during a batch")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Load, try and serve a package; 0 after an orderly stop by Ctrl-C or SIGTERM, 2 where it cannot be served."""
    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    before = _stop_alike()
    try:
        options = BatchingOptions(
            arguments.max_batch, arguments.wait_ms, arguments.max_pending, arguments.timeout_s, arguments.in_thread
        )
        app = make_app(load_package(arguments.package), options)
        with asyncio.Runner(loop_factory=_fastest_loop()) as runner:
            runner.run(run_server(app, arguments.host, arguments.port, f"{arguments.package.name} at"))
    except KeyboardInterrupt:
        print(f"{arguments.package.name} is no longer served", flush=True)
    except (PackageError, ValueError, OSError, ImportError) as error:
        print(f"recsys_edu serve: {error}", file=sys.stderr)
        return 2
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return 0


def _stop_alike() -> Any:
    """Let SIGTERM end us as Ctrl-C does, also while a package loads; returns what it did before.

    uvicorn answers what it has begun, then sends itself the signal again.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, signal.default_int_handler)


if __name__ == "__main__":
    sys.exit(main())
