"""What launches depend on besides their problem: the GPU's size and generation."""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, slots=True)
class Chip:
    num_sms: int
    capability: int  # 10 * major + minor

    @property
    def has_wide_products(self) -> bool:
        """Whether matrix units take operands from memory (wgmma, tcgen05): sm_90 to sm_110. Those
        of the others, sm_120 too, take both from registers, which wider tiles spill.
        """
        return 90 <= self.capability < 120


HOPPER = Chip(num_sms=132, capability=90)  # H100, H200; assumed where there is no GPU to ask


@cache
def chip_of(device: torch.device) -> Chip:
    if device.type != "cuda":
        return HOPPER
    properties = torch.cuda.get_device_properties(device)
    return Chip(properties.multi_processor_count, 10 * properties.major + properties.minor)
