"""How an adapted layer is printed: as its class prints it, with the adapter."""

from lightning_lora.layers.as_module import LayerAsModule


class LayerAsText(LayerAsModule):
    """An adapted layer that says what its adapter is."""

    def extra_repr(self) -> str:
        """Describe the layer and the adapter."""
        return f"{super().extra_repr()}, {self._lora_about()}".removeprefix(", ")

    def _lora_about(self) -> str:
        """The adapter in a few words."""
        settings = self.lora_settings
        parts = [f"r={settings.r}", f"scaling={settings.scaling:g}"]
        if settings.use_dora:
            parts.append("use_dora=True")
        elif settings.is_difference:
            parts.append(f"init={settings.init!r}")
        names = [matrix.name for matrix in self.lora_matrices if matrix.name]
        if names:
            parts.append(f"parts={names}")
        return ", ".join(parts)

    def __repr__(self) -> str:
        """Return the text of the layer's class, which may be one of its own, with its adapter and present class."""
        text = super().__repr__()
        about = self._lora_about()
        class_name = type(self).__name__
        ends_as_usual = text.endswith(")")  # as in Linear(...)
        if not ends_as_usual:
            return f"{class_name}: {text}, {about}"
        # nn.Module's __repr__ calls extra_repr, but those of other classes, such as
        # Conv1D, do not
        if about not in text:
            text = f"{text.removesuffix(')')}, {about})"
        if text.startswith(class_name):
            return text
        return class_name + text[text.index("(") :]
