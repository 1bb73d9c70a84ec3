"""Times of GPU calls that are to be compared: interleaved, with a cold cache, without the host's share."""

from collections.abc import Callable

import torch

Call = Callable[[], object]
# More than the second-level cache of any card there is; writing it evicts the operands.
FLUSH_BYTES = 512 << 20
WARM_UPS = 3


def graphed(call: Call) -> Call:
    """``call`` as one CUDA graph: what its kernels take, not what launching them costs the host."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def interleaved(calls: dict[str, Call], rounds: int, graphs: bool = True) -> dict[str, list[float]]:
    """Milliseconds of every call in every round; the calls of a round follow one another.

    Without ``graphs`` the host launches each call while the cache is being flushed.
    """
    replays = {name: graphed(call) for name, call in calls.items()} if graphs else calls
    for call in calls.values() if not graphs else ():
        call()
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in calls}
        for name, replay in replays.items():
            flush.zero_()
            events[name][0].record()
            replay()
            events[name][1].record()
        torch.cuda.synchronize()
        for name, (start, stop) in events.items():
            times[name].append(start.elapsed_time(stop))
    return times


def spread(times: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    low, middle, high = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {"p20": low, "p50": middle, "p80": high}
