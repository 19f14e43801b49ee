"""One rank of the two-hosts test, started by torchrun: trains DLRM, then counts what crosses between the hosts.

    two_hosts_worker.py RESULT_FOLDER <arguments of train_dlrm>

Every rank writes RESULT_FOLDER/<rank>.json: for the NODE pattern and for flat exchanges the bytes that this rank's
exchanges sent to the other host, and what this host's network interface sent meanwhile.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from recsys_edu.distributed.embeddingbag import ShardedEmbeddingBagCollection
from recsys_edu.distributed.sharding_plan import construct_module_sharding_plan, grid_shard, table_row_wise
from recsys_edu.distributed.types import ShardingEnv
from recsys_edu.examples import train_dlrm
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

BATCH, DIM, STEPS = 2048, 64, 8


def main() -> None:
    folder, arguments = Path(sys.argv[1]), train_dlrm.parse_arguments(sys.argv[2:])
    with train_dlrm.process_group(arguments.timeout) as device:
        train_dlrm.train(arguments, device)
        result = {name: count(local_size) for name, local_size in (("node", 2), ("flat", dist.get_world_size()))}
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(result))
        dist.barrier()


def count(local_size: int) -> dict[str, object]:
    """Look up and train one TWRW and one GRID table, with ranks taken to be on hosts of `local_size`."""
    configs = [
        EmbeddingBagConfig(name=name, num_embeddings=1000, embedding_dim=DIM, feature_names=[name])
        for name in ("twrw", "grid")
    ]
    module = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
    cuts = {"twrw": table_row_wise(host_index=1), "grid": grid_shard([0, 1])}
    plan = construct_module_sharding_plan(module, cuts, local_size=2, world_size=4, device_type="cpu")
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    sharded = ShardedEmbeddingBagCollection(module, plan, env, local_size=local_size)
    ids = torch.randint(0, 1000, (2 * BATCH,))
    batch = KeyedJaggedTensor.from_lengths_sync(["twrw", "grid"], ids, torch.ones(2 * BATCH, dtype=torch.int64))
    log = sharded.shards.exchange.log = []
    dist.barrier()
    before = interface_bytes()
    for _ in range(STEPS):
        sharded(batch).values().sum().backward()
    dist.barrier()
    after = interface_bytes()
    here = dist.get_rank() // 2
    crossing: dict[str, int] = {}
    for record in log:
        sent = sum(size for rank, size in enumerate(record.bytes_W) if rank // 2 != here)
        crossing[record.label] = crossing.get(record.label, 0) + sent
    return {"log": crossing, "interface": after - before}


def interface_bytes() -> int:
    """Bytes this network namespace has sent through the interface that gloo uses."""
    name = os.environ["GLOO_SOCKET_IFNAME"]
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith(f"{name}:"))
    return int(line.split(":")[1].split()[8])


if __name__ == "__main__":
    main()
