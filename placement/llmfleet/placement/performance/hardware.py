"""Published figures of accelerators, and which of them a GPUType is.

    figures_of(gpu_type) -> Device | None        what its `spec.hardware` says, else the catalogue's entry of its name

All tensor figures are **dense**: data sheets print twice as much "with sparsity", which no served model has. Links are
one direction. Every entry names its source. Where a maker's own documents differ (B200: 7.7 or 8 TB/s) the data
sheet counts.

Memory is not what data sheets print: the 80 "GB" of an H100 are 85.5 * 10^9 bytes. It is what the drivers report
(nvidia-smi: T4 15360 MiB, A10 and A10G 23028, L4 23034, A40 and L40S 46068, A100 40960 and 81920, H100 81559, H100 NVL
95830, H200 143771, B200 183359, GB200 189471, B300 275040; rocm-smi: MI300X 206141652992 bytes): HBM as its name says,
in GiB, less what a driver keeps, and GDDR less the sixteenth that error correction takes. Of a GPUType its own
`spec.memoryGib` counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmfleet.api import GPUType


@dataclass(frozen=True)
class Device:
    """One accelerator."""

    name: str
    """Name in the catalogue, or of the GPUType."""
    memory_gib: float
    """Memory, in GiB, as the driver reports it."""
    memory_gb_per_second: float
    """Memory bandwidth."""
    tflops_16bit: float
    """Dense bf16 or fp16 tensor TFLOPS."""
    tflops_8bit: float | None
    """Dense fp8 tensor TFLOPS; None before Ada, where fp8 weights are widened to 16 bits."""
    tflops_4bit: float | None
    """Dense fp4 tensor TFLOPS; None where the device has no such units."""
    link_gb_per_second: float
    """To the other devices of a node, one direction: NVLink, Infinity Fabric, else PCIe."""
    source: str
    """Where the figures are published."""

    @property
    def memory_gb(self) -> float:
        """Memory, in 10^9 bytes."""
        return self.memory_gib * 2**30 / 1e9

    def tflops(self, bits: float) -> float:
        """Arithmetic for weights of this many bits (scales included, so 4.5 for nvfp4).

        Where the device has no units of that width they are widened to 16 bits on the way in.
        """
        if bits <= 5 and self.tflops_4bit is not None:
            return self.tflops_4bit
        if 7 <= bits <= 9 and self.tflops_8bit is not None:
            return self.tflops_8bit
        return self.tflops_16bit


_PCIE3, _PCIE4, _PCIE5 = 16.0, 32.0, 64.0
_NVIDIA = "NVIDIA data sheet: "

CATALOGUE: dict[str, Device] = {
    device.name: device
    for device in (
        Device("t4", 15, 320, 65, None, None, _PCIE3, _NVIDIA + "T4 (fp16 65)"),
        Device("v100-sxm-32gb", 32, 900, 125, None, None, 150, _NVIDIA + "V100 SXM2 (fp16 125, NVLink 300)"),
        Device("a10", 22.5, 600, 125, None, None, _PCIE4, _NVIDIA + "A10 (bf16 125 | 250 sparse)"),
        Device("a10g", 22.5, 600, 70, None, None, _PCIE4, _NVIDIA + "A10G (bf16 70 | 140 sparse), not the A10's"),
        Device("a30", 24, 933, 165, None, None, _PCIE4, _NVIDIA + "A30 (bf16 165 | 330 sparse)"),
        Device("a40", 45, 696, 149.7, None, None, _PCIE4, _NVIDIA + "A40 (bf16 149.7 | 299.4 sparse)"),
        Device("l4", 22.5, 300, 121, 242, None, _PCIE4, _NVIDIA + "L4 (prints sparse only: bf16 242, fp8 485)"),
        Device("l40s", 45, 864, 362.05, 733, None, _PCIE4, _NVIDIA + "L40S (bf16 362.05 | 733 sparse)"),
        Device("a100-sxm-40gb", 40, 1555, 312, None, None, 300, _NVIDIA + "A100 (bf16 312 | 624, NVLink 600)"),
        Device("a100-pcie-40gb", 40, 1555, 312, None, None, _PCIE4, _NVIDIA + "A100 PCIe 40 GB"),
        Device("a100-sxm-80gb", 80, 2039, 312, None, None, 300, _NVIDIA + "A100 SXM 80 GB"),
        Device("a100-pcie-80gb", 80, 1935, 312, None, None, _PCIE4, _NVIDIA + "A100 PCIe 80 GB"),
        Device("h100-pcie", 79.6, 2000, 756, 1513, None, _PCIE5, _NVIDIA + "H100 PCIe (bf16 1513, fp8 3026 sparse)"),
        Device("h100-sxm", 79.6, 3350, 989, 1979, None, 450, _NVIDIA + "H100 SXM (bf16 1979, fp8 3958 sparse)"),
        Device("h100-nvl", 93.6, 3900, 835, 1671, None, 300, _NVIDIA + "H100 NVL (bf16 1671, fp8 3341 sparse)"),
        Device("h200-sxm", 140.4, 4800, 989, 1979, None, 450, _NVIDIA + "H200 SXM (bf16 1979, fp8 3958 sparse)"),
        Device("b200", 179.1, 8000, 2250, 4500, 9000, 900, _NVIDIA + "HGX B200 (fp4 144 PF sparse for eight)"),
        Device("b300", 268.6, 8000, 2250, 4500, 13500, 900, _NVIDIA + "HGX B300 (fp4 108 PF dense for eight)"),
        Device("gb200", 185, 8000, 2500, 5000, 10000, 900, _NVIDIA + "GB200 NVL72 (fp4 1440 PF sparse for 72)"),
        Device("mi300x", 192, 5300, 1307.4, 2614.9, None, 448, "AMD data sheet: MI300X (7 links of 64 GB/s)"),
        Device("mi325x", 256, 6000, 1307.4, 2614.9, None, 448, "AMD data sheet: MI325X (7 links of 64 GB/s)"),
    )
}
"""Known devices by name."""

_OTHER_NAMES = {
    "a100": "a100-sxm-80gb",
    "a100-40gb": "a100-sxm-40gb",
    "a100-80gb": "a100-sxm-80gb",
    "a100-sxm": "a100-sxm-80gb",
    "a100-pcie": "a100-pcie-80gb",
    "h100": "h100-sxm",
    "h100-80gb": "h100-sxm",
    "h200": "h200-sxm",
    "b200-sxm": "b200",
    "b300-sxm": "b300",
}


def figures_of(gpu_type: GPUType) -> Device | None:
    """What a GPUType can do: its own memory, and its own `spec.hardware` where given, else the catalogue's entry under
    its name.

    A name may carry a suffix after the device, for example `h100-sxm-spot`; that of `spec.sameHardwareAs` goes before
    its own. None where neither is known.
    """
    spec = gpu_type.spec
    known = _named(spec.same_hardware_as or gpu_type.metadata.name)
    if spec.hardware is None:
        return None if known is None else replace(known, memory_gib=spec.memory_gib)
    link = spec.hardware.link_gb_per_second
    return Device(
        name=gpu_type.metadata.name,
        memory_gib=spec.memory_gib,
        memory_gb_per_second=spec.hardware.memory_bandwidth_gb_per_second,
        tflops_16bit=spec.hardware.dense_tflops,
        tflops_8bit=spec.hardware.dense_tflops_8bit,
        tflops_4bit=spec.hardware.dense_tflops_4bit,
        link_gb_per_second=link if link is not None else (known.link_gb_per_second if known is not None else _PCIE4),
        source=f"GPUType {gpu_type.metadata.name}: spec.hardware",
    )


def _named(name: str) -> Device | None:
    parts = name.lower().replace("_", "-").removeprefix("nvidia-").removeprefix("amd-").split("-")
    for length in range(len(parts), 0, -1):
        prefix = "-".join(parts[:length])
        prefix = _OTHER_NAMES.get(prefix, prefix)
        if prefix in CATALOGUE:
            return CATALOGUE[prefix]
    return None
