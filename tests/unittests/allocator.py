"""Peak memory of torch's CPU allocator, from its log.

Authors
 * The sb_memeff authors 2026
"""

from torch.profiler import ProfilerActivity, profile


def allocator_peak(run):
    """Bytes of the peak of what a function without arguments allocates.

    What a GPU does not allocate does not count: copies that oneDNN makes inside
    a convolution, the gradient that the CPU's batch norm allocates first and
    replaces at once, and copies of indices and gradient of a max pooling whose
    input is channels_last and its output's gradient is not.
    """
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        run()
    found = []

    def walk(event, parent):
        if event.name == "[memory]":
            found.append((event.start_time_ns, event.extra_fields, parent))
        children = event.children
        if event.name == "aten::native_batch_norm_backward":
            made = [c for c in children if c.name == "aten::empty_like"]
            if len(made) > 1:
                children = [c for c in children if c is not made[0]]
        if event.name == "aten::max_pool2d_with_indices_backward":
            children = [c for c in children if c.name != "aten::contiguous"]
        for child in children:
            walk(child, event.name)

    for root in profiler.profiler.kineto_results.experimental_event_tree():
        walk(root, "")
    total = peak = 0
    # Size by address. What is freed here but older, garbage of other tests,
    # does not count.
    alive = {}
    for _, fields, parent in sorted(found, key=lambda event: event[0]):
        if fields.alloc_size < 0:
            total -= alive.pop(fields.ptr, 0)
        elif "convolution" not in parent:
            alive[fields.ptr] = fields.alloc_size
            total += fields.alloc_size
            peak = max(peak, total)
    return peak


# What cuDNN and cuBLAS may take for themselves, from the same allocator.
WORKSPACES = 200e6


def assert_near_allocator(counted, allocated):
    """All that is counted is there, and hardly more beside workspaces."""
    assert 0.98 * counted <= allocated <= 1.05 * counted + WORKSPACES
