"""diffusers computes what is computed here from an exported file, and its own files are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.cli.main import main
from tests.support.cases import file_names
from tests.support.compared import assert_same_tensors
from tests.support.models import TinyLM
from tests.support.peft_export import check_equal, read, trained

diffusers = pytest.importorskip("diffusers", minversion="0.34", exc_type=ImportError)
transformers = pytest.importorskip("transformers")
WEIGHTS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"


def unet() -> Any:
    torch.manual_seed(3)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, cross_attention_dim=8, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=4,
    ).eval()  # fmt: skip


def text_encoder() -> Any:
    torch.manual_seed(4)
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPTextConfig(
        vocab_size=20, max_position_embeddings=16, **sizes
    )
    return transformers.CLIPTextModel(config).eval()


def transformer() -> Any:
    torch.manual_seed(5)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
    ).eval()  # fmt: skip


def pixart() -> Any:
    sizes = {
        "sample_size": 8,
        "num_layers": 1,
        "attention_head_dim": 4,
        "num_attention_heads": 2,
    }
    return diffusers.PixArtTransformer2DModel(
        **sizes, cross_attention_dim=8, caption_channels=8, norm_num_groups=2
    )


@torch.no_grad()
def run(model: Any) -> Tensor:
    torch.manual_seed(6)
    x = torch.randn(1, 4, 8, 8)
    words = torch.randn(1, 3, 8)
    if isinstance(model, diffusers.UNet2DConditionModel):
        return model(x, 1, words)[0]
    if isinstance(model, diffusers.SD3Transformer2DModel):
        return model(x, words, words[:, 0], torch.tensor([1]))[0]
    return model(torch.arange(5)[None])[0]


def change(model: nn.Module) -> None:
    """Change PEFT's adapters, which are zero at first."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.add_(torch.rand_like(p), alpha=0.1)


def pipeline(part: Any) -> Any:
    """A pipeline with this part, and others that are not adapted."""
    if isinstance(part, diffusers.SD3Transformer2DModel):
        return diffusers.StableDiffusion3Pipeline(part, *[None] * 8)
    scheduler = diffusers.PNDMScheduler(steps_offset=1)
    others = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor"))
    others |= {"unet": part, "text_encoder": text_encoder(), "scheduler": scheduler}
    return diffusers.StableDiffusionPipeline(**others, requires_safety_checker=False)


def loaded(model: Any, path: Path) -> Tensor:
    """What a base computes with adapters from a file or folder."""
    ll.load_adapter(model, path)
    return run(model)


def renamed(folder: Path, change: Callable[[str], str] = str) -> Path:
    """Change the names in a file, and leave out its header."""
    save_file(
        {change(name): value for name, value in load_file(folder / WEIGHTS).items()},
        folder / WEIGHTS,
    )
    return folder


# Out


PIPELINES: list[tuple[Callable[[], Any], dict[str, Any]]] = [
    (
        unet,
        {
            "alpha": 5,
            "target_modules": "all",
            "use_rslora": True,
            "rank_pattern": {"to_q": 3},
        },
    ),
    (
        unet,
        {
            "target_modules": ["to_v", "conv1"],
            "use_dora": True,
            "alpha_pattern": {"to_v": 7},
        },
    ),
    (transformer, {"alpha": 5, "init": "pissa"}),
]


@pytest.mark.parametrize(("build", "config"), PIPELINES)
def test_a_pipeline_computes_the_same(
    build: Callable[[], Any], config: dict[str, Any], tmp_path: Path
) -> None:
    model = trained(build(), ll.LoRAConfig(r=2, **config), scale=0.1)
    here = run(model)
    assert (here - run(build())).norm() > 1e-3 * here.norm()
    ll.export_peft(model, tmp_path, uniform=build is transformer, format="diffusers")
    assert file_names(tmp_path) == ["README.md", WEIGHTS]
    check_equal(loaded(build(), tmp_path), here)
    part = build()
    part.load_lora_adapter(tmp_path, prefix=build.__name__, use_safetensors=True)
    check_equal(run(part), here)
    # the second one as to diffusers before 0.34
    for folder in (tmp_path, renamed(tmp_path)):
        part = build()
        pipeline(part).load_lora_weights(folder)
        check_equal(run(part), here)


def test_a_card_says_how_a_pipeline_reads_the_folder(tmp_path: Path) -> None:
    model = trained(unet(), ll.LoRAConfig(r=2, target_modules=["to_q"]))
    ll.export_peft(model, tmp_path, format="diffusers", base_name="me/tiny")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.tags == ["base_model:adapter:me/tiny", "lora"]
    assert 'DiffusionPipeline.from_pretrained("me/tiny")\n' in card.text
    (loading,) = [
        line for line in card.text.splitlines() if "load_lora_weights" in line
    ]
    part = unet()
    names = {"pipeline": pipeline(part)}
    exec(loading.replace("path/of/this/folder", str(tmp_path)), names)
    check_equal(run(part), run(model))


TARGETS = {"target_modules": ["to_q"]}


@pytest.mark.parametrize(
    ("build", "config", "says"),
    [
        (
            unet,
            {**TARGETS, "modules_to_save": ["conv_out"]},
            "would refuse 'conv_out.weight', 'conv_out.bias'",
        ),
        (
            lambda: TinyLM(tied=False),
            {"target_modules": ["q_proj"]},
            "TinyLM is none that is known",
        ),
        (
            pixart,
            TARGETS,
            "PixArtTransformer2DModel is none .*PixArt has none.*PeftModel",
        ),
    ],
)
def test_what_a_pipeline_cannot_hold(
    build: Any, config: dict[str, Any], says: str, tmp_path: Path
) -> None:
    model = trained(build(), ll.LoRAConfig(**config))
    ll.save_adapter(model, tmp_path / "a.safetensors")
    for source, why in (
        (model, says),
        (tmp_path / "a.safetensors", r"none that is known.*Load a file onto its model"),
    ):
        with pytest.raises(ll.ExportError, match=why):
            ll.export_peft(source, tmp_path / "out", format="diffusers")
    assert not (tmp_path / "out").exists()


def test_a_pipeline_cannot_hold_rows(tmp_path: Path) -> None:
    config = ll.LoRAConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"token_embedding": [1]}
    )
    model = trained(text_encoder(), config)
    with pytest.raises(ll.ExportError, match=r"rows that train.*no place"):
        ll.export_peft(model, tmp_path / "out", format="diffusers")


def test_a_folder_of_peft_tells_diffusers_its_scaling_and_its_configuration_may_be_edited(
    tmp_path: Path,
) -> None:
    model = trained(unet(), ll.LoRAConfig(r=2, alpha=8, target_modules=["to_q"]))
    part = unet()
    ll.export_peft(model, tmp_path)
    part.load_lora_adapter(tmp_path, prefix="base_model.model", use_safetensors=True)
    check_equal(run(part), run(model))
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4'))
    here = loaded(unet(), tmp_path)
    check_equal(here, run(read(unet(), tmp_path).get_base_model()))
    assert (here - run(model)).norm() > 1e-3 * here.norm()


# In


def test_a_file_that_diffusers_wrote(tmp_path: Path) -> None:
    part = unet()
    ranks = {"target_modules": ["to_q", "conv1"], "rank_pattern": {"to_q": 3}}
    part.add_adapter(
        LoraConfig(r=2, lora_alpha=6, use_rslora=True, use_dora=True, **ranks)
    )
    change(part)
    part.save_lora_adapter(tmp_path)
    check_equal(loaded(unet(), tmp_path), run(part))
    assert (run(unet()) - run(part)).norm() > 1e-3 * run(part).norm()


@pytest.mark.parametrize(
    ("a", "b"), [(".lora_A.", ".lora_B."), (".lora.down.", ".lora.up.")]
)
def test_a_file_without_a_header_is_read_as_diffusers_reads_it(
    tmp_path: Path, a: str, b: str
) -> None:
    ll.export_peft(
        trained(unet(), ll.LoRAConfig(r=2, **TARGETS)), tmp_path, format="diffusers"
    )
    renamed(tmp_path, lambda name: name.replace(".lora_A.", a).replace(".lora_B.", b))
    part = unet()
    pipeline(part).load_lora_weights(tmp_path)
    with pytest.warns(ll.LoRAWarning, match="does not say with which lora_alpha"):
        check_equal(loaded(unet(), tmp_path), run(part))


def parts_in(folder: Path, *, use_dora: bool = False) -> dict[str, Any]:
    """Two adapted parts of a pipeline, whose adapters diffusers saved."""
    models = {"unet": unet(), "text_encoder": text_encoder()}
    given = dict[str, Any]()
    for name, model in models.items():
        settings = LoraConfig(
            r=len(name), use_rslora=name == "unet", target_modules=["to_q", "q_proj"]
        )
        settings.use_dora = use_dora and name == "unet"
        inject_adapter_in_model(settings, model)
        model.peft_config = {"default": settings}
        change(model)
        given[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
        given[f"{name}_lora_adapter_metadata"] = settings.to_dict()
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, **given)
    return models


# a UNet and a text encoder that train together, beside other parts
class DreamBooth(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
        self.unet = unet()
        self.text_encoder = text_encoder()
        self.head = nn.Linear(2, 2)


BOTH: dict[str, Any] = {
    "r": 2,
    "alpha": 3,
    "target_modules": ["to_q", "q_proj"],
    "rank_pattern": {"q_proj": 1},
}
BOTH["exclude_modules"] = ["vae"]


def test_all_parts_of_a_module_are_written_into_one_file_and_read(
    tmp_path: Path,
) -> None:
    module: Any = trained(DreamBooth(), ll.LoRAConfig(**BOTH), scale=0.1)
    ll.save_adapter(module, tmp_path / "adapter.safetensors")
    export = [
        "export",
        str(tmp_path / "adapter.safetensors"),
        str(tmp_path / "file"),
        "--format",
        "diffusers",
    ]
    assert main(export) == 0
    ll.export_peft(module, tmp_path / "model", format="diffusers")
    assert_same_tensors(
        load_file(tmp_path / "file" / WEIGHTS), load_file(tmp_path / "model" / WEIGHTS)
    )
    whole = pipeline(unet())
    whole.load_lora_weights(tmp_path / "file")
    fresh = DreamBooth()
    ll.load_adapter(fresh, tmp_path / "file")
    for build in (unet, text_encoder):
        here = run(getattr(module, build.__name__))
        plain = run(build())
        assert (here - plain).norm() > 1e-3 * plain.norm()
        for other in (whole, fresh):
            check_equal(run(getattr(other, build.__name__)), here)
    with pytest.raises(
        ll.ExportError,
        match=r"'text_encoder\..* outside of 'unet'.*all of them if root is left out",
    ):
        ll.export_peft(module, tmp_path / "one", root="unet", format="diffusers")
    with pytest.warns(
        ll.LoRAWarning, match="held 'text_encoder' too, which is replaced"
    ):
        ll.export_peft(
            trained(unet(), ll.LoRAConfig(**TARGETS)),
            tmp_path / "file",
            format="diffusers",
        )
    module = trained(DreamBooth(), ll.LoRAConfig(**BOTH, modules_to_save=["head"]))
    with pytest.raises(
        ll.ExportError,
        match=r"'head.bias', 'head.weight' .* outside of 'unet', 'text_encoder'",
    ):
        ll.export_peft(module, tmp_path / "one", format="diffusers")


def test_a_part_goes_where_its_name_is(tmp_path: Path) -> None:
    parts: Any = nn.ModuleDict(
        {
            "unet": unet(),
            "text_encoder": text_encoder(),
            "text_encoder_2": text_encoder(),
        }
    )
    config = ll.LoRAConfig(
        r=2, target_modules=["q_proj"], exclude_modules=["text_encoder"]
    )
    model: Any = trained(parts, config)
    ll.export_peft(model, tmp_path, format="diffusers")
    ll.load_adapter(parts, tmp_path)
    check_equal(run(parts["text_encoder_2"]), run(model["text_encoder_2"]))
    check_equal(run(parts["text_encoder"]), run(text_encoder()))


def test_a_module_or_a_model_gets_its_parts_of_a_file(tmp_path: Path) -> None:
    models = parts_in(tmp_path)
    module = DreamBooth()
    ll.load_adapter(module, tmp_path)
    for build, other in ((unet, "text_encoder"), (text_encoder, "unet")):
        check_equal(run(getattr(module, build.__name__)), run(models[build.__name__]))
        with pytest.warns(ll.LoRAWarning, match=f"also holds adapters of '{other}'"):
            check_equal(loaded(build(), tmp_path), run(models[build.__name__]))
    with pytest.raises(
        ll.AdapterMismatchError,
        match="several parts of a pipeline: 'text_encoder', 'unet'",
    ):
        ll.load_adapter(TinyLM(), tmp_path)
    parts_in(tmp_path, use_dora=True)
    with pytest.raises(ll.AdapterFileError, match="parts with other use_dora"):
        ll.load_adapter(DreamBooth(), tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        "{",
        json.dumps({"text_encoder.peft_type": "LOKR"}),
        json.dumps({"text_encoder.r": "two"}),
    ],
)
def test_a_header_that_says_something_else(tmp_path: Path, header: str) -> None:
    ll.export_peft(
        trained(text_encoder(), ll.LoRAConfig(target_modules=["q_proj"])),
        tmp_path,
        format="diffusers",
    )
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, {METADATA: header})
    with pytest.raises(ll.AdapterFileError, match=WEIGHTS):
        ll.load_adapter(text_encoder(), tmp_path)


def test_a_file_without_a_header_and_without_any_a(tmp_path: Path) -> None:
    save_file(
        {"text_encoder.q_proj.lora.up.weight": torch.ones(4, 2)}, tmp_path / WEIGHTS
    )
    says = pytest.warns(ll.LoRAWarning, match="does not say with which lora_alpha")
    with (
        says,
        pytest.raises(ll.AdapterFileError, match="only one of A and B of 'q_proj'"),
    ):
        ll.load_adapter(
            nn.ModuleDict({"text_encoder": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})}),
            tmp_path,
        )


def test_a_pipeline_of_adapted_models_is_written_merged(tmp_path: Path) -> None:
    parts: Any = nn.ModuleDict({"unet": unet(), "text_encoder": text_encoder()})
    parts = trained(
        parts, ll.LoRAConfig(r=2, target_modules=["to_q", "conv1", "q_proj"])
    )
    whole = pipeline(parts["unet"])
    whole.text_encoder = parts["text_encoder"]
    with pytest.warns(ll.LoRAWarning, match="writes merged weights") as said:
        whole.save_pretrained(tmp_path, variant="own")
    assert len(said) == 2
    for name, part in parts.items():
        again = type(part).from_pretrained(tmp_path / name, variant="own").eval()
        check_equal(run(again), run(part))
