"""LoRA for any LightningModule, in one line: ``Trainer(callbacks=[LoRACallback(r=8)])``."""

from lightning_lora import guards  # noqa: F401  # who look at each moment of a fine-tune
from lightning_lora.callback import LoRACallback
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterStateError,
    BaseMismatchError,
    BestCheckpointWarning,
    ConfigError,
    DeadAdapterWarning,
    ExportError,
    FreshLayerWarning,
    LoRAError,
    LoRAWarning,
    MergePrecisionWarning,
    OptimizerError,
    StrategyError,
    TargetError,
)
from lightning_lora.layers import register_adapter
from lightning_lora.model.inject import inject_adapters
from lightning_lora.model.merge import merge_adapters
from lightning_lora.model.remove import remove_adapters
from lightning_lora.model.rows.adapter_names import adapter_names
from lightning_lora.model.switch import adapters, disable_adapters
from lightning_lora.model.unmerge import unmerge_adapters
from lightning_lora.monitor import LoRAMonitor
from lightning_lora.storage.files import (
    export_peft,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
)
from lightning_lora.storage.load.from_state_dicts import load_adapter_state_dict
from lightning_lora.storage.merged_model import save_merged
from lightning_lora.storage.several import combine_adapters, set_adapter
from lightning_lora.storage.state import adapter_state_dict
from lightning_lora.summary import summarize
from lightning_lora.sweep import LoRASweep

__version__ = "0.2.0"

__all__ = [
    "AdapterFileError",
    "AdapterMismatchError",
    "AdapterStateError",
    "BaseMismatchError",
    "BestCheckpointWarning",
    "ConfigError",
    "DeadAdapterWarning",
    "ExportError",
    "FreshLayerWarning",
    "LoRACallback",
    "LoRAConfig",
    "LoRAError",
    "LoRAMonitor",
    "LoRASweep",
    "LoRAWarning",
    "MergePrecisionWarning",
    "OptimizerError",
    "StrategyError",
    "TargetError",
    "adapter_names",
    "adapter_state_dict",
    "adapters",
    "combine_adapters",
    "disable_adapters",
    "export_peft",
    "inject_adapters",
    "load_adapter",
    "load_adapter_state_dict",
    "load_from_checkpoint",
    "merge_adapters",
    "register_adapter",
    "remove_adapters",
    "save_adapter",
    "save_merged",
    "set_adapter",
    "summarize",
    "unmerge_adapters",
]


def __dir__() -> list[str]:
    """What completion shows: the public names, and not the rooms of the package."""
    return ["__version__", *__all__]
