"""What the machine can do at best: the two numbers of a roofline."""

import torch
from torch.utils.benchmark import Timer


def seconds(statement: str, min_run_time: float = 1.0, **names: object) -> float:
    """Median time of a statement on all threads, in runs of so many seconds together."""
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_run_time).median


def matmul_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of a large matrix product."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2e-9 * size**3 / seconds("a @ b", a=a, b=b)


def bandwidth_gb(device: torch.device) -> float:
    """Rate at which memory is read: a matrix far larger than any cache, times a vector."""
    rows = 16_384 if device.type == "cpu" else 262_144
    matrix = torch.randn(rows, 8192, device=device)
    return 1e-9 * matrix.nbytes / seconds("m.mv(v)", m=matrix, v=matrix[0].clone())
