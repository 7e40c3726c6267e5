"""diffusers computes what is computed here from a file of kohya's form, for Stable Diffusion and SDXL."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.cli.main import main
from tests.storage.formats.test_diffusers import text_encoder, transformer
from tests.support.cases import file_names
from tests.support.compared import assert_same_tensors
from tests.support.peft_export import check_equal, trained

diffusers = pytest.importorskip("diffusers", minversion="0.42", exc_type=ImportError)
transformers = pytest.importorskip("transformers")
FILE = "kohya_lora.safetensors"


SIZES: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 2,
}
SIZES |= {"cross_attention_dim": 8, "attention_head_dim": 4}


def sd_unet() -> Any:
    torch.manual_seed(7)
    down, up = (
        ("CrossAttnDownBlock2D", "DownBlock2D"),
        ("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return diffusers.UNet2DConditionModel(
        **SIZES, down_block_types=down, up_block_types=up
    ).eval()


def sdxl_unet() -> Any:
    torch.manual_seed(7)
    return diffusers.UNet2DConditionModel(
        **SIZES, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), transformer_layers_per_block=(1, 2),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32,
    ).eval()  # fmt: skip


def second_text_encoder() -> Any:
    torch.manual_seed(8)
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPTextConfig(
        vocab_size=20, max_position_embeddings=16, projection_dim=8, **sizes
    )
    return transformers.CLIPTextModelWithProjection(config).eval()


class Sd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = sd_unet()
        self.text_encoder = text_encoder()

    def pipeline(self) -> Any:
        others = dict.fromkeys(
            ("vae", "tokenizer", "safety_checker", "feature_extractor")
        )
        scheduler = diffusers.PNDMScheduler(steps_offset=1)
        return diffusers.StableDiffusionPipeline(
            unet=self.unet,
            text_encoder=self.text_encoder,
            scheduler=scheduler,
            **others,
            requires_safety_checker=False,
        )


class Sdxl(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = sdxl_unet()
        self.text_encoder = text_encoder()
        self.text_encoder_2 = second_text_encoder()

    def pipeline(self) -> Any:
        others = dict.fromkeys(("vae", "tokenizer", "tokenizer_2"))
        scheduler = diffusers.EulerDiscreteScheduler()
        return diffusers.StableDiffusionXLPipeline(
            **dict(self.named_children()), scheduler=scheduler, **others
        )


@torch.no_grad()
def outputs(module: Any) -> dict[str, Tensor]:
    """What each member of a pipeline computes."""
    torch.manual_seed(6)
    x = torch.randn(1, 4, 8, 8)
    words = torch.randn(1, 3, 8)
    added = {"text_embeds": torch.randn(1, 8), "time_ids": torch.randn(1, 6)}
    found = {"unet": module.unet(x, 1, words, added_cond_kwargs=added)[0]}
    for name, member in module.named_children():
        if name != "unet":
            found[name] = member(torch.arange(5)[None])[0]
    return found


ENCODER = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
LAYERS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj",
    "net.2",
    "proj_in",
    "proj_out",
    "conv",
    "conv1",
    "conv2",
]
LAYERS += [
    "conv_shortcut",
    "time_emb_proj",
    "conv_in",
    "conv_out",
    "linear_1",
    "linear_2",
    *ENCODER,
]
PARTS: list[tuple[Callable[[], Any], dict[str, Any]]] = [
    (
        Sd,
        {
            "target_modules": LAYERS,
            "alpha": 5,
            "rank_pattern": {"to_q": 3, "conv1": 1, "fc1": 3},
        },
    ),
    (
        Sdxl,
        {
            "target_modules": LAYERS,
            "use_rslora": True,
            "alpha_pattern": {"to_v": 7, "conv": 2, "q_proj": 1},
        },
    ),
    (Sdxl, {"target_modules": ["to_q", "q_proj", "v_proj"]}),
    (Sd, {"target_modules": ["to_v", "q_proj"], "init": "pissa"}),
]


# Out


@pytest.mark.filterwarnings("ignore:kohya's own scripts skip")
@pytest.mark.parametrize(("build", "config"), PARTS)
def test_a_pipeline_computes_the_same(
    build: Callable[[], Any], config: dict[str, Any], tmp_path: Path
) -> None:
    module = trained(build(), ll.LoRAConfig(r=2, **config), scale=0.1)
    ll.export_peft(module, tmp_path, format="kohya")
    assert file_names(tmp_path) == [FILE]
    other = build()
    base = outputs(other)
    other.pipeline().load_lora_weights(tmp_path, weight_name=FILE)
    here = outputs(module)
    for name, found in outputs(other).items():
        assert (here[name] - base[name]).norm() > 1e-3 * base[name].norm()
        check_equal(found, here[name])


def names_in_file(tensors: dict[str, Tensor]) -> set[str]:
    """The names of layers in a file."""
    return {name.partition(".")[0] for name in tensors}


def names_in(folder: Path) -> set[str]:
    """The names of layers in the file in a folder."""
    return names_in_file(load_file(folder / FILE))


SD_NAMES = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
    "lora_unet_up_blocks_0_upsamplers_0_conv",
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
}
SDXL_NAMES = {
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q",
    "lora_unet_input_blocks_3_0_op",
    "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q",
    "lora_unet_output_blocks_2_2_conv",
    "lora_unet_label_emb_0_2",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "lora_te2_text_model_encoder_layers_1_mlp_fc1",
}


@pytest.mark.filterwarnings(
    "ignore:kohya's own scripts skip 'add_embedding.linear_2' without"
)
@pytest.mark.parametrize(("build", "expected"), [(Sd, SD_NAMES), (Sdxl, SDXL_NAMES)])
def test_layers_have_the_names_that_all_readers_know(
    build: Any, expected: set[str], tmp_path: Path
) -> None:
    module = build()
    targets = ["to_q", "conv", "fc1"]
    if isinstance(module, Sdxl):
        targets.append("add_embedding.linear_2")
    module = trained(module, ll.LoRAConfig(r=2, target_modules=targets))
    ll.save_adapter(module, tmp_path / "adapter.safetensors")
    ll.export_peft(module, tmp_path / "model", format="kohya")
    assert (
        main(
            [
                "export",
                str(tmp_path / "adapter.safetensors"),
                str(tmp_path / "file"),
                "--format",
                "kohya",
            ]
        )
        == 0
    )
    assert expected <= names_in(tmp_path / "model")
    assert_same_tensors(
        load_file(tmp_path / "file" / FILE), load_file(tmp_path / "model" / FILE)
    )


def test_attentions_of_text_encoders_are_whole(tmp_path: Path) -> None:
    module = trained(
        Sdxl(),
        ll.LoRAConfig(
            r=2,
            target_modules=[
                "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
            ],
        ),
    )
    ll.export_peft(module, tmp_path, format="kohya")
    tensors = load_file(tmp_path / FILE)
    attention = "lora_te2_text_model_encoder_layers_0_self_attn"
    assert names_in(tmp_path) == {
        f"{attention}_{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "out_proj")
    }
    assert tensors[f"{attention}_q_proj.lora_up.weight"].any()
    assert not tensors[f"{attention}_k_proj.lora_up.weight"].any()


def test_a_text_encoder_alone_may_be_that_of_another_pipeline(tmp_path: Path) -> None:
    model = trained(text_encoder(), ll.LoRAConfig(r=2, target_modules=["fc1"]))
    with pytest.warns(
        ll.LoRAWarning, match="named as that of Stable Diffusion. If it is one of SDXL"
    ):
        ll.export_peft(model, tmp_path, format="kohya")


# Flux


def flux() -> Any:
    torch.manual_seed(9)
    return diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=0, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 2, 2),
    ).eval()  # fmt: skip


@torch.no_grad()
def output_of_flux(model: Any) -> Tensor:
    torch.manual_seed(6)
    inputs = {
        "hidden_states": torch.randn(1, 3, 4),
        "encoder_hidden_states": torch.randn(1, 2, 8),
    }
    places = {"img_ids": torch.zeros(3, 3), "txt_ids": torch.zeros(2, 3)}
    return model(
        **inputs, **places, pooled_projections=torch.randn(1, 8), timestep=torch.ones(1)
    )[0]


IN_BLOCKS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
]
IN_BLOCKS += ["proj", "net.2", "norm1.linear", "norm1_context.linear"]
OF_FLUX: list[dict[str, Any]] = [
    {"target_modules": IN_BLOCKS, "alpha": 5, "rank_pattern": {"to_k": 3}},
    {"target_modules": ["to_q", "add_v_proj"], "use_rslora": True},
]


@pytest.mark.parametrize("config", OF_FLUX)
def test_a_pipeline_of_flux_computes_the_same(
    config: dict[str, Any], tmp_path: Path
) -> None:
    model = trained(flux(), ll.LoRAConfig(r=2, **config), scale=0.1)
    ll.export_peft(model, tmp_path, format="kohya")
    assert {
        "lora_unet_double_blocks_1_img_attn_qkv",
        "lora_unet_double_blocks_0_txt_attn_qkv",
    } <= names_in(tmp_path)
    other = flux()
    base = output_of_flux(other)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    diffusers.FluxPipeline(scheduler, *[None] * 5, other).load_lora_weights(
        tmp_path, weight_name=FILE
    )
    here = output_of_flux(model)
    assert (here - base).norm() > 1e-3 * base.norm()
    check_equal(output_of_flux(other), here)


# the layers of a single block, with as many outputs as diffusers reads
class FluxTransformer2DModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = nn.Module()
        block.attn = nn.ModuleDict({"to_q": nn.Linear(8, 3072)})
        block.attn["to_k"] = nn.Linear(8, 3072)
        block.attn["to_v"] = nn.Linear(8, 3072)
        block.proj_mlp = nn.Linear(8, 4 * 3072)
        block.proj_out = nn.Linear(8, 8)
        self.single_transformer_blocks = nn.ModuleList([block])


@pytest.mark.parametrize("targets", [["to_q", "to_v", "proj_out"], ["proj_mlp"]])
def test_single_blocks_of_flux_are_read_by_diffusers(
    targets: list[str], tmp_path: Path
) -> None:
    # diffusers gives this module no name before something has imported it
    conversion: Any = import_module("diffusers.loaders.lora_conversion_utils")
    convert = conversion._convert_kohya_flux_lora_to_diffusers
    module: Any = nn.ModuleDict({"transformer": FluxTransformer2DModel()})
    module = trained(module, ll.LoRAConfig(r=2, alpha=3, target_modules=targets))
    ll.save_adapter(module, tmp_path / "adapter.safetensors")
    for source, folder in (
        (module, "model"),
        (tmp_path / "adapter.safetensors", "file"),
    ):
        ll.export_peft(source, tmp_path / folder, format="kohya")
    assert_same_tensors(
        load_file(tmp_path / "file" / FILE), load_file(tmp_path / "model" / FILE)
    )
    found = convert(load_file(tmp_path / "file" / FILE))
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and f"{name}.lora_B.weight" in found:
            update = found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"]
            expected = (
                1.5 * layer.lora_B @ layer.lora_A
                if hasattr(layer, "lora_A")
                else torch.zeros_like(update)
            )
            assert torch.allclose(update, expected, atol=1e-6)


# What is refused


TO_Q = {"target_modules": ["to_q"]}
REFUSED: list[tuple[Callable[[], Any], dict[str, Any], str]] = [
    (sd_unet, {**TO_Q, "use_dora": True}, "DoRA.*A and B alone.*format='diffusers'"),
    (
        sd_unet,
        {**TO_Q, "modules_to_save": ["conv_out"]},
        "would refuse 'conv_out.weight', 'conv_out.bias'",
    ),
    (
        sd_unet,
        {**TO_Q, "bias": "lora_only", "target_modules": ["conv1"]},
        "would refuse 'down_blocks.0.resnets.0.conv1",
    ),
    (
        transformer,
        TO_Q,
        "'transformer_blocks.0.attn.to_q' of 'transformer' have no name",
    ),
    (
        flux,
        {"target_modules": ["x_embedder"]},
        "'x_embedder' of 'transformer' have no name",
    ),
    (
        second_text_encoder,
        {"target_modules": ["text_projection"]},
        "'text_projection' of 'text_encoder' have no name",
    ),
    (
        text_encoder,
        {"target_modules": ["token_embedding"]},
        "'embeddings.token_embedding' of 'text_encoder' have no name",
    ),
    (
        lambda: nn.Sequential(nn.Linear(4, 4)),
        {"target_modules": ["0"]},
        "format='kohya' is for .* Sequential is none",
    ),
]


@pytest.mark.parametrize(("build", "config", "says"), REFUSED)
def test_what_a_reader_would_drop(
    build: Any, config: dict[str, Any], says: str, tmp_path: Path
) -> None:
    model = trained(build(), ll.LoRAConfig(r=2, **config))
    with pytest.raises(ll.ExportError, match=says):
        ll.export_peft(model, tmp_path / "out", format="kohya")
    assert not (tmp_path / "out").exists()


def test_layers_that_kohyas_scripts_skip_and_members_that_are_replaced_are_named(
    tmp_path: Path,
) -> None:
    ll.export_peft(
        trained(Sd(), ll.LoRAConfig(r=2, target_modules=["to_q", "fc1"])),
        tmp_path,
        format="kohya",
    )
    model = trained(sd_unet(), ll.LoRAConfig(r=2, target_modules=["conv_in"]))
    skips = pytest.warns(ll.LoRAWarning, match="skip 'conv_in' without")
    with (
        skips,
        pytest.warns(ll.LoRAWarning, match="held 'lora_te' too, which is replaced"),
    ):
        ll.export_peft(model, tmp_path, format="kohya")


# In


@pytest.mark.filterwarnings("ignore:kohya's own scripts skip")
@pytest.mark.parametrize(("build", "config"), PARTS)
def test_the_file_is_read_again(
    build: Callable[[], Any], config: dict[str, Any], tmp_path: Path
) -> None:
    module = trained(build(), ll.LoRAConfig(r=2, **config), scale=0.1)
    ll.export_peft(module, tmp_path, format="kohya")
    other = build()
    ll.load_adapter(other, tmp_path)
    here = outputs(module)
    for name, found in outputs(other).items():
        check_equal(found, here[name])


def changed_file(
    folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    """Write a file anew, with other tensors."""
    tensors = load_file(folder / FILE)
    save_file(change(tensors), folder / FILE)


def with_other_alphas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same updates, with another alpha for each layer, or none, which means the rank."""
    changed = dict[str, Tensor]()
    for number, name in enumerate(sorted(names_in_file(tensors))):
        a = tensors[f"{name}.lora_down.weight"]
        b = tensors[f"{name}.lora_up.weight"] * tensors[f"{name}.alpha"] / len(a)
        alpha = torch.tensor(float(number))
        if number:
            b = b * len(a) / alpha
            changed[f"{name}.alpha"] = alpha
        changed |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
    return changed


def test_each_layer_has_its_own_alpha_or_its_rank(tmp_path: Path) -> None:
    config = ll.LoRAConfig(
        r=2, alpha=5, target_modules=["to_q", "conv2", "fc2"], rank_pattern={"to_q": 3}
    )
    module = trained(Sd(), config, scale=0.1)
    ll.export_peft(module, tmp_path, format="kohya")
    changed_file(tmp_path, with_other_alphas)
    other = Sd()
    ll.load_adapter(other, tmp_path / FILE)
    here = outputs(module)
    for name, found in outputs(other).items():
        check_equal(found, here[name], 1e-5)


def test_the_names_of_diffusers_are_read_for_sdxl_too(tmp_path: Path) -> None:
    module = trained(Sdxl(), ll.LoRAConfig(r=2, target_modules=["to_q"]), scale=0.1)
    ll.export_peft(module, tmp_path, format="kohya")
    original = "lora_unet_input_blocks_4_1"
    named = "lora_unet_down_blocks_1_attentions_0"
    changed_file(
        tmp_path,
        lambda tensors: {
            name.replace(original, named): value for name, value in tensors.items()
        },
    )
    assert named in str(names_in(tmp_path))
    other = Sdxl()
    ll.load_adapter(other, tmp_path / FILE)
    check_equal(outputs(other)["unet"], outputs(module)["unet"])


def test_a_model_gets_its_part_of_a_file(tmp_path: Path) -> None:
    module: Any = trained(
        Sd(), ll.LoRAConfig(r=2, target_modules=["to_q", "fc1"]), scale=0.1
    )
    ll.export_peft(module, tmp_path, format="kohya")
    other = Sd()
    with pytest.warns(ll.LoRAWarning, match="also holds adapters of 'text_encoder'"):
        ll.load_adapter(other.unet, tmp_path / FILE)
    check_equal(outputs(other)["unet"], outputs(module)["unet"])


def test_files_that_are_not_read_are_called_what_they_are(
    tmp_path: Path, capsys: Any
) -> None:
    ll.export_peft(
        trained(Sd(), ll.LoRAConfig(r=2, target_modules=["to_q", "fc1"])),
        tmp_path,
        format="kohya",
    )
    path = tmp_path / FILE
    with pytest.raises(
        ll.AdapterMismatchError,
        match="several parts of a pipeline: 'text_encoder', 'unet'",
    ):
        ll.load_adapter(nn.Linear(4, 4), path)
    assert main(["inspect", str(path)]) != 0
    assert "kohya's sd-scripts, and only their model tells" in capsys.readouterr().err
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    flux = {
        f"{name}.lora_down.weight": torch.ones(2, 8),
        f"{name}.lora_up.weight": torch.ones(24, 2),
    }
    save_file(flux, path)
    with pytest.raises(
        ll.AdapterMismatchError, match=f"'{name}', and .*Let diffusers read it"
    ):
        ll.load_adapter(transformer(), path)
    save_file({**flux, f"{name}.dora_scale": torch.ones(24)}, path)
    with pytest.raises(
        ll.AdapterFileError, match="dora_scale', of another method than LoRA"
    ):
        ll.load_adapter(transformer(), path)
    name = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    t5 = {
        f"{name}.lora_down.weight": torch.ones(2, 8),
        f"{name}.lora_up.weight": torch.ones(8, 2),
    }
    save_file({**flux, **t5}, path)
    with pytest.raises(
        ll.AdapterFileError, match=f"'{name}', in no part .*Let diffusers read it"
    ):
        ll.load_adapter(transformer(), path)
    torch.save({"state_dict": flux}, tmp_path / "inside.ckpt")
    with pytest.raises(
        ll.AdapterFileError, match=r"adapters of kohya's.*Let diffusers read it"
    ):
        ll.load_adapter(sd_unet(), tmp_path / "inside.ckpt")


@pytest.mark.parametrize("missing", ["lora_up", "lora_down"])
def test_a_file_that_lacks_a_factor(missing: str, tmp_path: Path) -> None:
    ll.export_peft(
        trained(sd_unet(), ll.LoRAConfig(r=2, **TO_Q)), tmp_path, format="kohya"
    )
    tensors = load_file(tmp_path / FILE)
    tensors.pop(f"{min(names_in_file(tensors))}.{missing}.weight")
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(
        ll.AdapterFileError, match="only one of A and B of 'down_blocks"
    ):
        ll.load_adapter(sd_unet(), tmp_path / FILE)
