"""The README.md of an exported folder: a model card, which a hub shows and which says how the adapters are loaded."""

import json
import re
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import warn
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.stored_modules import StoredModule

README = "README.md"
FOLDER = "path/of/this/folder"  # what the code in a card calls its folder

# a base may have a name without an owner, such as "gpt2"
_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_ALWAYS_SHOWN = ("r", "alpha", "target_modules")
_MARK = re.compile(r"<!-- lightning_lora ([0-9a-f]{8}): .* -->\n$")


@dataclass(frozen=True)
class ModelCard:
    """What a README.md says of exported adapters."""

    export: Export
    library: str  # the name of the library that reads the folder
    loading: str  # the lines of Python that load the folder

    def files(self, directory: Path) -> dict[str, bytes]:
        """Return the README.md to write into a directory: nothing, if one is there that is not as we wrote it."""
        if not _may_be_replaced(directory / README):
            return {}
        return {README: _marked(self.text()).encode()}

    def text(self) -> str:
        """Return the card, without the mark at its end."""
        parts = [
            self._header(),
            self._title(),
            "Trained with lightning_lora.",
            "## How to load them",
            _block(self.loading),
            "## Arguments of the training",
            _block(_arguments(self.export.stored.config)),
        ]
        metrics = self.export.stored.metrics
        if metrics:
            parts += [
                "## Metrics",
                "Logged last before the checkpoint was written:",
                _listed_metrics(metrics),
            ]
        return "\n\n".join(parts) + "\n"

    def _header(self) -> str:
        """The lines that a hub reads. They are YAML, in which strings of JSON are valid."""
        model = self.export.stored_inner
        tags = ["lora"]
        lines = ["---"]
        repository = repository_of(model)
        if repository:
            lines.append(f"base_model: {json.dumps(repository)}")
            tags.append(f"base_model:adapter:{repository}")
        if model.library.startswith("transformers."):
            tags.append("transformers")
        lines.append(f"library_name: {self.library}")
        lines.append("tags:")
        for tag in sorted(tags):
            lines.append(f"- {json.dumps(tag)}")
        lines.append("---")
        return "\n".join(lines)

    def _title(self) -> str:
        """The heading, with the last part of the base's name, or with its class."""
        model = self.export.stored_inner
        name = Path(model.pretrained).name or model.class_name
        return f"# LoRA adapters for {name}" if name else "# LoRA adapters"


def repository_of(model: StoredModule) -> str:
    """Return the repository of the hub that a model came from.

    Empty: it is a folder, or not known.
    """
    return model.pretrained if is_repository(model.pretrained) else ""


def is_repository(name: str) -> bool:
    """Return whether a base's name is that of a repository of the hub, and not a folder's."""
    return _REPOSITORY.fullmatch(name) is not None and not Path(name).exists()


def _block(code: str) -> str:
    """Lines of Python in Markdown."""
    return f"```python\n{code}\n```"


def _arguments(config: LoRAConfig) -> str:
    """The arguments that differ from the defaults, and those that are always shown."""
    given = {*config.to_stored(), *_ALWAYS_SHOWN}
    lines = ["LoRAConfig("]
    for name, value in config.to_dict().items():
        if name in given:
            lines.append(f"    {name}={value!r},")
    lines.append(")")
    return "\n".join(lines)


def _listed_metrics(metrics: dict[str, float]) -> str:
    """A line for each metric."""
    return "\n".join(f"- {name}: {value:.4g}" for name, value in metrics.items())


# Who wrote a README.md: ours ends in a mark with a checksum of the text above, so that
# changes by hand are seen


def _marked(text: str) -> str:
    """Add the mark to a card."""
    mark = (
        f"<!-- lightning_lora {_checksum(text)}: the next export_peft replaces this "
        "file, if it is unchanged -->"
    )
    return f"{text}\n{mark}\n"


def _may_be_replaced(place: Path) -> bool:
    """Whether there is no file yet, or one as we wrote it. Warn of one of ours that was changed."""
    if not place.exists():
        return True
    text = ""
    with suppress(OSError, ValueError):
        text = place.read_text(encoding="utf-8")
    mark = _MARK.search(text)
    if mark is None:  # others wrote the file
        return False
    above = text[: mark.start() - 1]  # without the newline before the mark
    is_as_written = mark[1] == _checksum(above)
    if not is_as_written:
        warn(
            f"{place} was changed after export_peft wrote it, so it stays as it is. It "
            "may be of other adapters."
        )
    return is_as_written


def _checksum(text: str) -> str:
    """Eight characters for a text."""
    return f"{zlib.crc32(text.encode()):08x}"
