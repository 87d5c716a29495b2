"""The memory that a call takes while it runs."""

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call) -> int:
    """The most bytes that torch held at once during `call()` of those that it allocated in it, results included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = call()
    held = peak = 0
    events = [x for x in found.profiler.kineto_results.events() if x.name() == "[memory]"]
    for event in sorted(events, key=lambda x: x.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak
