"""What the quantiser's training says between the processes of a data-parallel group. Every function is a no-op in a single process."""

import torch
import torch.distributed as dist


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    return dist.get_rank() if _num_processes() > 1 else 0


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all processes, in place where there are several; bitwise the same in each."""
    if _num_processes() > 1:
        dist.all_reduce(values)
    return values


def gather_integers(row: list[int], device: torch.device) -> list[list[int]]:
    """One list of integers from every process, in the order of their ranks; the lists are of one length."""
    if _num_processes() == 1:
        return [row]
    local = torch.tensor(row, dtype=torch.int64, device=device)
    rows = [torch.empty_like(local) for _ in range(_num_processes())]
    dist.all_gather(rows, local)
    return torch.stack(rows).tolist()
