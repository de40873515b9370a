"""Stands in for helpers of the multi-process tests, which the source distribution lacks: gloo processes on the CPU."""

import functools
import os
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    torch.set_num_threads(1)


def _start_rank_processes(function, args: tuple = (), nprocs: int = 2) -> None:
    """Calls `function(rank, *args)` in `nprocs` fresh processes; raises if one of them does.

    gloo's threads abort a process now and then on a busy machine. Processes that a signal ended are started once more; an error that
    Python raised, such as a comparison that failed, is never tried again.
    """
    try:
        mp.spawn(function, args=args, nprocs=nprocs, join=True)
    except mp.ProcessExitedException as error:
        if error.signal_name is None:
            raise
        print(f"{error}: once more", file=sys.stderr)
        mp.spawn(function, args=args, nprocs=nprocs, join=True)


def _in_group(rank: int, function, world_size: int, port: int, args: tuple, kwargs: dict) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    _set_rank_device(rank)
    dist.init_process_group(_get_distributed_backend(), rank=rank, world_size=world_size)
    try:
        function(rank, *args, **kwargs)
        dist.barrier()  # the first to leave closes connections that the others may still read from
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int = 2):
    """Decorates `function(rank, ...)`: a call runs it in `world_size` processes that form a process group."""

    def decorate(function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            _start_rank_processes(_in_group, (function, world_size, port, args, kwargs), world_size)

        return run

    return decorate
