"""Where a model goes that is loaded from a checkpoint: ``map_location``, as ``torch.load`` takes it."""

from collections.abc import Mapping
from typing import Any

import torch

from lightning_lora.errors import ConfigError


class PlaceOfModel:
    """The device for a model, by ``map_location`` and by where its file's tensors were.

    Lightning's ``load_from_checkpoint`` reads the tensors onto their devices, and moves
    the model to that of the first one. Here all are read into the host's memory, and
    the same device is found without them.
    """

    def __init__(self, map_location: Any) -> None:
        # a device can be called too: as a decorator
        self._is_device = isinstance(map_location, str | torch.device)
        self._is_map = isinstance(map_location, Mapping)
        self._is_function = not self._is_device and callable(map_location)
        is_known = self._is_device or self._is_map or self._is_function
        if map_location is not None and not is_known:
            raise ConfigError(
                f"map_location={map_location!r} is not known. Expected a device such "
                "as 'cuda:0', a dict from devices to devices, or a function, as "
                "torch.load takes them."
            )
        self._map_location = map_location
        # where the file's first tensor was when it was saved, such as "cuda:0"
        self._saved_on = ""

    def for_reading(self) -> Any:
        """Return the ``map_location`` that reads a file into the host's memory."""
        # torch takes no function for some tensors: so it gets one only if it must
        if self._is_map or self._is_function:
            return self._keep_on_host
        return "cpu"

    def _keep_on_host(self, storage: Any, location: str) -> Any:
        """Leave a storage where torch has read it, and note where the first one was."""
        if not self._saved_on:
            self._saved_on = location
        return storage

    def device(self) -> str | torch.device | None:
        """Return the device for the model, after its file was read.

        None: the model stays where it is.
        """
        saved_on = self._saved_on or "cpu"
        if self._is_map:
            mapped: str | torch.device = self._map_location.get(saved_on, saved_on)
            return mapped
        if self._is_function:
            storage = self._map_location(torch.UntypedStorage(0), saved_on)
            # None: the function leaves it to torch, which takes the device of the file
            return torch.device(saved_on) if storage is None else storage.device
        return self._map_location  # type: ignore[no-any-return]  # a device, or None
