"""The code of the page on sharing that names a base: each section is run with a tiny model in its place."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from tests.storage.formats.test_export_models import run, tiny
from tests.support.models import Around
from tests.support.peft_export import check_equal, trained

PAGE = (Path(__file__).parents[3] / "docs" / "sharing.md").read_text()
TEXTS = ["the cat sat on a mat", "a dog ran"]
# which peft asks for
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)


def code_of(section: str) -> str:
    """The code below a heading, without that which runs with the page's own module."""
    _, _, text = PAGE.partition(f"\n## {section}\n")
    text, _, _ = text.partition("\n## ")
    return "".join(re.findall(r"^```py\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


def execute(section: str, base: str = "", **names: Any) -> dict[str, Any]:
    """Run the code of a section, with another base. Return its names."""
    code = re.sub(r'"owner/\w+"', repr(base), code_of(section))
    assert code
    names |= {
        "torch": torch,
        "export_peft": ll.export_peft,
        "merge_adapters": ll.merge_adapters,
    }
    exec(code, names)
    return names


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@torch.no_grad()
def test_transformers_and_peft() -> None:
    base = tiny("Llama", "ForCausalLM")
    base.save_pretrained("base")
    config = ll.LoRAConfig(r=2, target_modules=["q_proj", "v_proj"])
    module = trained(Around(base), config)
    ll.export_peft(module, "adapter")
    learned = run(module.model)
    assert (learned - run(base)).norm() > 1e-3 * learned.norm()
    names = execute("transformers and PEFT", "base")
    check_equal(run(names["adapted"].eval()), learned)
    check_equal(run(names["merged"].eval()), learned)


@pytest.mark.parametrize("section", ["diffusers", "ComfyUI and A1111"])
def test_diffusers_reads_both_forms(section: str) -> None:
    pytest.importorskip("diffusers", minversion="0.42", exc_type=ImportError)
    from tests.storage.formats.test_kohya import Sd, outputs

    base = Sd()
    module = trained(base, ll.LoRAConfig(r=2, target_modules=["to_q", "q_proj"]))
    learned = outputs(module)
    pipeline = base.pipeline()
    execute(section, module=module, pipeline=pipeline)
    if section != "diffusers":
        pipeline.load_lora_weights("lora", weight_name="kohya_lora.safetensors")
    for name, found in outputs(base).items():
        check_equal(found, learned[name])


def save_tiny_encoder(folder: Path) -> None:
    """Save a sentence encoder: a tiny BERT, whose tokenizer knows a few words, and the mean of its outputs."""
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    package = pytest.importorskip("sentence_transformers")
    transformers = pytest.importorskip("transformers")
    bert = tiny("Bert", "Model")
    bert.save_pretrained(folder / "bert")
    words = " ".join(["[PAD] [UNK] [CLS] [SEP] [MASK]", *TEXTS]).split()
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(words)))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(
        folder / "bert"
    )
    transformer = modules.Transformer(str(folder / "bert"))
    pooling = modules.Pooling(bert.config.hidden_size)
    package.SentenceTransformer(modules=[transformer, pooling]).save(
        str(folder / "encoder")
    )


def test_a_sentence_encoder(here: Path) -> None:
    save_tiny_encoder(here)
    from sentence_transformers import SentenceTransformer

    base = SentenceTransformer("encoder")
    config = ll.LoRAConfig(r=2, target_modules=["query", "value"])
    module = trained(Around(base), config)
    learned = embeddings(module.model)
    assert (learned - embeddings(base)).norm() > 1e-3 * learned.norm()
    names = execute("sentence-transformers", "encoder", module=module)
    check_equal(embeddings(names["encoder"]), learned)


def embeddings(encoder: Any) -> Tensor:
    result: Tensor = encoder.encode(TEXTS, convert_to_tensor=True)
    return result


@pytest.mark.filterwarnings("ignore")  # of torch's exporter
@torch.no_grad()
def test_onnx(here: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    base = nn.Sequential(nn.Linear(8, 6), nn.Tanh())
    module = trained(base, ll.LoRAConfig(r=2, target_modules=["0"]))
    inputs = torch.linspace(-1, 1, 24).view(3, 8)
    learned = module(inputs)
    execute("ONNX", module=module, inputs=inputs)
    session = runtime.InferenceSession(
        here / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (name,) = [each.name for each in session.get_inputs()]
    outputs, *_ = session.run(None, {name: inputs.numpy()})
    check_equal(torch.from_numpy(outputs), learned)
