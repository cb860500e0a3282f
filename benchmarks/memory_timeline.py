"""Memory in use during one training step, stored and reversible.

The step is that of the network alone, as in peak_memory.py: batch 64 x 2 s (200
frames x 80 mels), float32, SGD with momentum. Memory is counted on fake tensors, so
the picture is the same everywhere and no GPU is needed.

    python benchmarks/memory_timeline.py

writes the result file and the picture beside it.

Authors
 * The sb_memeff authors 2026
"""

from peak_memory import sgd
from resnets import networks
from result_file import RESULTS, write_results

from sb_memeff.analysis.plot import plot_timelines
from sb_memeff.analysis.profile import Profile
from sb_memeff.memory.step import training_step_memory

BATCH, FRAMES, MELS = 64, 200, 80
# Labels, and names of the compared networks.
NETWORKS = {
    "ResNet293, activations stored": "stored",
    "RevNet293 Type II, activations reconstructed": "type_2",
}


def main():
    """Analyses, draws and writes the result file."""
    found = []
    for label, kind in NETWORKS.items():
        build = networks("ResNet293")[kind]
        memory = training_step_memory(build, (BATCH, FRAMES, MELS), sgd)
        found.append(
            Profile(label, BATCH, BATCH, 2.0, None, "fp32", "SGD", memory)
        )
        print(f"{label}: {memory.peak_bytes / 1e9:.2f} GB", flush=True)
    plot_timelines(found, RESULTS / "memory_timeline.png")
    write_results(
        __file__,
        [
            {
                "network": one.label,
                "input_shape": (BATCH, FRAMES, MELS),
                "precision": one.precision,
                "optimizer": one.optimizer,
                "parameters": one.memory.parameters,
                "peak_bytes": one.memory.peak_bytes,
                "peak_phase": one.memory.peak_phase,
                "by_kind": one.memory.by_kind,
                # The peak of each phase.
                "phases": {
                    phase: max(
                        (
                            dict(zip(kinds, sizes, strict=True))
                            for sizes in zip(*kinds.values(), strict=True)
                        ),
                        key=lambda sizes: sum(sizes.values()),
                    )
                    for phase, kinds in one.memory.timeline.items()
                },
            }
            for one in found
        ],
    )


if __name__ == "__main__":
    main()
