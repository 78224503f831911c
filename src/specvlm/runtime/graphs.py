"""CUDA graphs, and the fixed memory that they are bound to.

A graph replays the same kernels on the same addresses, so everything that changes from pass to pass lives in a
`Workspace`: the KV rows, the state on the device (where the known text ends, and at which position), the input tokens.
A workspace serves one session at a time and is handed on with its graphs: the next request captures nothing.

Several devices and threads: whatever launches kernels or captures runs inside `on(device)` of its model, a capture on
that device's own stream and no two captures at once. Copies between devices need nothing besides: torch orders them
behind the current streams of both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Generic, TypeVar

import torch

from specvlm.core.tree import MAX_NODES
from specvlm.core.upload import staged

T = TypeVar("T")
_ROUND_UP = 1024  # rows: capacities of similar requests coincide, so that their workspace can be shared
_MOST_GRAPHS = 192  # of a workspace: a drafter whose trees change every round must not fill the GPU with them
_MOST_FREE = 2  # a model that drafts for itself leases two at a time
_capturing = threading.Lock()  # torch allows one capture at a time in a process


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: Triton launches and graphs replay there, whatever their tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def _capture_stream(device: torch.device) -> Any:
    """Return the stream on which a device's graphs are captured: graphs share a memory pool only on one stream.

    Left to itself, torch captures all graphs of a process on one stream of the device that came first.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Graph(Generic[T]):
    """A function of no arguments, captured once, that reads and writes memory of fixed place.

    Args:
        run: queues work on the current stream and waits for nothing; it runs once before it is captured.
        pool: memory pool shared with the other graphs of the workspace, which never run at the same time.
    """

    def __init__(self, run: Callable[[], T], pool: Any, device: torch.device) -> None:
        with _capturing, on(device):
            # Compiles kernels and lets libraries allocate what must not be allocated in a capture; on the stream of all
            # other work, with which it shares the kernels' workspaces.
            run()
            self._graph = torch.cuda.CUDAGraph()
            side = _capture_stream(device)
            with torch.cuda.graph(self._graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self._output = run()

    def replay(self) -> T:
        """Run it; return its output, which the next replay overwrites."""
        self._graph.replay()
        return self._output


class Workspace:
    """KV storage and device state of one session, with the graphs captured over them.

    Args:
        shape: layers, heads and head_dim of the KV storage.
        capacity: rows.
        dtype: of keys and values.
        device: where.
    """

    def __init__(self, shape: tuple[int, int, int], capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        layers, heads, head_dim = shape
        self.device = device
        self.storage = torch.empty(layers, 2, heads, capacity, head_dim, dtype=dtype, device=device)
        self.state = torch.zeros(2, dtype=torch.int32, device=device)  # rows of the known text, position of the next
        self._state = (0, 0)  # what `state` holds
        self.tokens = torch.zeros(MAX_NODES + 1, dtype=torch.int64, device=device)  # input rows of a pass
        self._owned: dict[Hashable, Any] = {}
        self._graphs: dict[Hashable, Graph[Any]] = {}
        self._pool: Any = None

    @property
    def capacity(self) -> int:
        """Rows that fit."""
        return self.storage.shape[3]

    def set_state(self, length: int, position: int) -> None:
        """Say how many rows the known text has, and at which position the next one stands."""
        if (length, position) != self._state:
            self._state = (length, position)
            self.state.copy_(staged(self._state, self.device, torch.int32), non_blocking=True)

    def own(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what graphs need besides (tensors of fixed place), made on first use and kept as long as they."""
        if key not in self._owned:
            self._owned[key] = make()
        return self._owned[key]

    def has(self, key: Hashable) -> bool:
        """Whether a graph was captured under this key."""
        return key in self._graphs

    def run(self, key: Hashable, function: Callable[[], T]) -> T:
        """Run a function as the graph of this key, captured on first use; its output lives until the next run."""
        if key not in self._graphs:
            if len(self._graphs) == _MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            self._graphs[key] = Graph(function, self._pool, self.device)
        graph: Graph[T] = self._graphs.pop(key)
        self._graphs[key] = graph  # the last used stands last
        return graph.replay()


class Workspaces:
    """The workspaces of one model: leased to sessions, and kept for the next ones when they are returned."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype, self._device = shape, dtype, device
        self._free: list[Workspace] = []
        self._lock = threading.RLock()  # a session ends in any thread, and while the garbage collector interrupts us

    def lease(self, capacity: int) -> Workspace:
        """Return a workspace of at least `capacity` rows that nobody else holds."""
        with self._lock:
            for workspace in self._free:
                if workspace.capacity >= capacity:
                    self._free = [other for other in self._free if other is not workspace]
                    return workspace
            self._free = []  # too small: their memory goes before the larger one is allocated
        rows = -(-capacity // _ROUND_UP) * _ROUND_UP if self._device.type == "cuda" else capacity
        return Workspace(self._shape, rows, self._dtype, self._device)

    def release(self, workspace: Workspace) -> None:
        """Take a workspace back."""
        with self._lock:
            self._free = [*self._free, workspace][-_MOST_FREE:]
