from __future__ import annotations

import pytest
import torch

from recsys_edu.kernels.backend import fbgemm_status


@pytest.fixture(autouse=True)
def _seed_and_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items):
    if not fbgemm_status().available:
        for item in items:
            if item.get_closest_marker("fbgemm"):
                item.add_marker(pytest.mark.skip(reason=fbgemm_status().reason))
