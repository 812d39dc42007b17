"""A layer that calls an op under DDP and FSDP2's fully_shard: two processes, with gloo, against one that has the whole
batch. This file is what the processes run.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flagen
from flagen import Input, Scalar, Spec, logsigmoid, sigmoid, v

KINDS = ("ddp", "fsdp", "fsdp-checkpoint")
RANKS, STEPS, TIMEOUT = 2, 3, 240
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo"
)

gate = Input("gate", "b t h")
gated = Spec("gated", value=v * sigmoid(gate), log_decay=logsigmoid(gate) * Scalar("rate"))


class Layer(torch.nn.Module):
    """rwkv6, whose bonus is a parameter of its own, then a spec of a user's, with a scalar and a normaliser's pair."""

    def __init__(self, device: str, again: bool) -> None:
        super().__init__()
        backend = "torch" if device == "cpu" else "auto"
        self.first = flagen.compile("rwkv6", chunk_size=16, backend=backend)
        self.second = flagen.compile(gated, chunk_size=16, backend=backend)
        self.again = again
        self.into, self.out = torch.nn.Linear(32, 4 * 32), torch.nn.Linear(32, 3 * 32 + 2)
        self.bonus = torch.nn.Parameter(torch.randn(2, 16))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False) if self.again else self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        r, k, v, w = self.into(x).unflatten(-1, (4, 2, 16)).unbind(-3)
        o, _ = self.first(r, k, v, torch.nn.functional.logsigmoid(w), self.bonus)
        x = x + o.flatten(-2)
        *qkv, g = self.out(x).split((32, 32, 32, 2), -1)
        o, _ = self.second(*(y.unflatten(-1, (2, 16)) for y in qkv), g, rate=0.5)
        return x + o.flatten(-2)


def model_of(device: str, again: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(Layer(device, again), Layer(device, again)).to(device)


def batches(device: str) -> Tensor:
    """[STEPS, RANKS, T, C]: a row for each rank."""
    return torch.randn(STEPS, RANKS, 21, 32, generator=torch.Generator().manual_seed(1)).to(device) / 2


def trained(model: torch.nn.Module, rows: Tensor) -> list[float]:
    """The losses of a few steps of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for x in rows:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Parameters by name, gathered and on the CPU."""
    return {
        name.removeprefix("module."): (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().cpu().clone()
        for name, x in tensors.items()
    }


def work(rank: int, folder: Path, device: str) -> None:
    """What one process does: trains on its row in each way, of which the first process writes what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    if device != "cpu":
        torch.cuda.set_device(rank)
    for kind in KINDS:
        model = spread(model_of(device, again="checkpoint" in kind), kind, device)
        losses = trained(model, batches(device)[:, rank : rank + 1])
        found = whole(dict(model.named_parameters()))
        if rank == 0:
            torch.save((losses, found), folder / f"{kind}.pt")
    dist.barrier()
    dist.destroy_process_group()


def spread(model: torch.nn.Module, kind: str, device: str) -> torch.nn.Module:
    """The model over all processes."""
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh(device, (RANKS,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    held = sum(x.to_local().numel() for x in model.parameters())
    assert held < 0.6 * sum(x.numel() for x in model.parameters())  # it is sharded
    return model


@functools.cache
def launched(folder: Path, device: str) -> None:
    """Runs `work` in RANKS processes."""
    (folder / "meeting").unlink(missing_ok=True)  # of a run that failed
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder), device], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(RANKS)
    ]
    try:
        output = [process.communicate(timeout=TIMEOUT)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * RANKS, "\n".join(output)


def compare(kind: str, folder: Path, device: str) -> None:
    folder = folder / device
    folder.mkdir(exist_ok=True)
    launched(folder, device)
    losses, got = torch.load(folder / f"{kind}.pt")
    model = model_of(device, again=False)
    before = whole(dict(model.state_dict()))
    trained(model, batches(device))
    want = whole(dict(model.state_dict()))
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] < 100
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert not torch.equal(value, before[name]), name  # every parameter was trained
        torch.testing.assert_close(
            got[name], value, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one_does(kind, folder):
    compare(kind, folder, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two CUDA devices")
@pytest.mark.parametrize("kind", KINDS)
def test_two_gpus_train_as_one_does(kind, folder):
    compare(kind, folder, "cuda")


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
