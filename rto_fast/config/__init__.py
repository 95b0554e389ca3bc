"""Every setting and its default, one frozen dataclass a stage. Zero means off.

The defaults are the paper's for Llama-3-8B on UltraFeedback (arXiv 2404.18922). A recipe changes a default by
constructing the config with another value; a user changes it by a flag of the field's name.
"""

from rto_fast.config.base import FOLLOWS, FREE, TEMPLATE_DATE, RunConfig, check_wandb, expand_home
from rto_fast.config.lora import ALL_LINEAR, Lora, LoraSettings
from rto_fast.config.presets import DistillConfig, PPOConfig, RLVRConfig
from rto_fast.config.rto import RTOConfig
from rto_fast.config.rto_settings import RTOSettings
from rto_fast.config.supervised import DPOConfig, PreferenceConfig, RMConfig, SFTConfig, SupervisedConfig

__all__ = [
    "ALL_LINEAR", "FOLLOWS", "FREE", "TEMPLATE_DATE", "DPOConfig", "DistillConfig", "Lora", "LoraSettings",
    "PPOConfig", "PreferenceConfig", "RLVRConfig", "RMConfig", "RTOConfig", "RTOSettings", "RunConfig", "SFTConfig",
    "SupervisedConfig", "check_wandb", "expand_home",
]  # fmt: skip
