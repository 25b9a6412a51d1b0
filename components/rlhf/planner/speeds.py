"""How fast devices are assumed to be."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Peaks of one device, and the shares of them that the stages are assumed to reach."""

    name: str
    flops: float  # per second, in bf16
    bandwidth: float  # of its memory, in bytes per second
    links: float  # to the other devices of its node
    network: float  # to other nodes, its share of the node's
    training_share: float = 0.40
    forward_share: float = 0.50
    bandwidth_share: float = 0.60
    overhead_seconds: float = 60.0  # of starting a stage, loading and saving

    def sentence(self) -> str:
        return (
            f"{self.name}: {self.training_share:.0%} of {self.flops / 1e12:.3g} TFLOP/s in training, {self.forward_share:.0%} in forward "
            f"passes, {self.bandwidth_share:.0%} of {self.bandwidth / 1e12:.2g} TB/s in generation, {self.links / 1e9:.0f} GB/s "
            f"between the devices of a node and {self.network / 1e9:.0f} GB/s of each to other nodes, "
            f"{self.overhead_seconds:.0f} s to start"
        )


# Data sheets: dense bf16 without sparsity, by the memory of the device. Links and network: what collective operations reach, assumed.
SPEEDS = {
    24: Speed(name="24 GB (L4)", flops=121e12, bandwidth=0.3e12, links=20e9, network=10e9),
    80: Speed(name="80 GB (H100 SXM)", flops=989e12, bandwidth=3.35e12, links=300e9, network=40e9),
    141: Speed(name="141 GB (H200)", flops=989e12, bandwidth=4.8e12, links=300e9, network=40e9),
}
# Measured on two cores of a server (benchmarks/LOG.md); the bandwidth is that of its memory.
CPU = Speed(
    name="CPU, two cores",
    flops=160e9,
    bandwidth=15e9,
    links=5e9,
    network=1e9,
    training_share=0.5,
    forward_share=0.6,
    bandwidth_share=0.4,
    overhead_seconds=15,
)


def speed_of(gpu_memory: int | None, *, on_gpu: bool) -> Speed:
    """The speed of the smallest known device that has this much memory."""
    if not on_gpu:
        return CPU
    size = (gpu_memory or 80 * 2**30) / 2**30
    return next((speed for limit, speed in SPEEDS.items() if size <= limit), SPEEDS[141])
