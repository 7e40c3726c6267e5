"""Tell the library that wrote a file by its names."""

from collections.abc import Iterable

_PEFT = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "tokens",
}
"""The ends of the names of an adapter's tensors in PEFT's files, and what they are."""

PEFT_CONFIG = "adapter_config.json"
"""PEFT's file with the configuration, beside the tensors."""

PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""The files that PEFT writes its tensors into, the newer form first."""

LORALIB = (".lora_A", ".lora_B")
"""The ends of the names of an adapter's tensors in loralib's files."""


def peft_name(name: str) -> tuple[str, str] | None:
    """Return the layer of a PEFT tensor, and its part.

    It is None for a tensor that does not belong to an adapter.

    Example:
        >>> peft_name("base_model.model.q.lora_A.weight")
        ('base_model.model.q', 'A')
    """
    for suffix, what in _PEFT.items():
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}"), what
    return None


def is_peft(names: Iterable[str]) -> bool:
    """Whether these are names of a PEFT file.

    Example:
        >>> is_peft(["base_model.model.q.lora_A.weight"]), is_peft(["q.lora_A", "q.lora_B"])
        (True, False)
    """
    return any(isinstance(name, str) and peft_name(name) for name in names)


def is_loralib(names: Iterable[str]) -> bool:
    """Whether these are names of a loralib file.

    Example:
        >>> is_loralib(["q.lora_A", "q.lora_B", "q.bias"]), is_loralib(["q.weight", "q.bias"])
        (True, False)
    """
    return any(isinstance(name, str) and name.endswith(LORALIB) for name in names)
