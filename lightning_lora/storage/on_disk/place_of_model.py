"""Where a model goes that is loaded from a checkpoint: ``map_location``, as ``torch.load`` takes it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_lora.errors import ConfigError

Device = str | torch.device


class PlaceOfModel:
    """The device for a model, by ``map_location`` and by where its file's tensors were.

    Lightning's ``load_from_checkpoint`` reads the tensors onto their devices, and moves
    the model to that of the first one. Here all are read into the host's memory, and
    the same device is found without them.
    """

    def __init__(self, map_location: Any) -> None:
        self._map_location = map_location
        self._find_device = _finder(map_location)
        # where the file's first tensor was when it was saved, such as "cuda:0"
        self._saved_on = ""

    def for_reading(self) -> Any:
        """Return the ``map_location`` that reads a file into the host's memory."""
        # torch takes no function for some tensors: so it gets one only if it must
        return "cpu" if self._find_device is None else self._keep_on_host

    def _keep_on_host(self, storage: Any, location: str) -> Any:
        """Leave a storage where torch has read it, and note where the first one was."""
        if not self._saved_on:
            self._saved_on = location
        return storage

    def move(self, model: nn.Module) -> None:
        """Move the model to its device, after its file was read."""
        device = self._map_location
        if self._find_device is not None:
            device = self._find_device(self._saved_on or "cpu")
        if device is not None:
            model.to(device)


def _finder(map_location: Any) -> Callable[[str], Device] | None:
    """What finds the device of the model by that of the file. None: the device is given, or none is."""
    # a device comes first, because it can be called too: as a decorator
    if map_location is None or isinstance(map_location, str | torch.device):
        return None
    if isinstance(map_location, Mapping):
        return lambda saved_on: map_location.get(saved_on, saved_on)
    if callable(map_location):
        return partial(_device_by, map_location)
    raise ConfigError(
        f"map_location={map_location!r} is not known. Expected a device such as "
        "'cuda:0', a dict from devices to devices, or a function, as torch.load takes "
        "them."
    )


def _device_by(function: Callable[[Any, str], Any], saved_on: str) -> torch.device:
    """Where a function puts a storage that was saved on a device.

    Torch calls it with the storage. If it returns None, torch takes the device of the
    file.
    """
    storage = function(torch.UntypedStorage(0), saved_on)
    return torch.device(saved_on) if storage is None else storage.device
