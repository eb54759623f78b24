"""Image models of transformers and timm, contrastive ones too, and diffusers' denoisers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecosystem.base import Configuration, Program, shaken, sliced

__all__ = ["DIFFUSERS", "TIMM", "VISION"]

N, CLASSES = 3, 4
VIT = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 4,
}


def images(size: int, model: nn.Module, outputs: Callable[[dict[str, Any]], Any], **options: Any) -> Program:
    """Square pictures of three channels, one class each."""
    batch = {"pixel_values": torch.randn(N, 3, size, size), "labels": torch.randint(CLASSES, (N,))}
    loss_of = lambda z, b: F.cross_entropy(z, b["labels"])  # noqa: E731
    return Program(model, batch, sliced(batch, N), outputs, loss_of, **options)


def classifier(kind: str, size: int = 8, **options: Any) -> Program:
    """A classifier of transformers."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, num_labels=CLASSES, **options)
    model = shaken(transformers.AutoModelForImageClassification.from_config(config))
    return images(size, model, lambda b: model(pixel_values=b["pixel_values"]).logits)


def clip() -> Program:
    """Every image is compared with every text."""
    import transformers

    text = {
        "vocab_size": 11,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "max_position_embeddings": 8,
        "projection_dim": 6,
        "eos_token_id": 2,
    }
    model = shaken(
        transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=VIT | {"projection_dim": 6}, projection_dim=6)
        )
    )
    batch = {"input_ids": torch.randint(3, 11, (N, 4)), "pixel_values": torch.randn(N, 3, 8, 8)}
    loss_of = lambda z, b: (F.cross_entropy(z, torch.arange(N)) + F.cross_entropy(z.T, torch.arange(N))) / 2  # noqa: E731
    loss = lambda b: model(**b, return_loss=True).loss  # noqa: E731
    return Program(model, batch, sliced(batch, N), lambda b: model(**b).logits_per_text, loss_of, loss, mixed=True)


def image_text(head: str) -> Program:
    """One tower of CLIP under a head of the user's own."""
    import transformers

    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VIT))
    model = shaken(nn.ModuleDict({"tower": tower, "head": nn.Linear(8, CLASSES)}))
    return images(8, model, lambda b: model["head"](tower(pixel_values=b["pixel_values"]).pooler_output))


def timm_model(name: str, size: int = 32, train: bool = False, **options: Any) -> Program:
    """A model of timm, with the sizes of a small one."""
    import timm

    model = shaken(timm.create_model(name, num_classes=CLASSES, **options)).train(train)
    return images(size, model, lambda b: model(b["pixel_values"]), mixed=train)


def mixer(block: str) -> Program:
    """Patches mixed by multilayer perceptrons."""
    from timm.models import mlp_mixer

    sizes = {"img_size": 8, "patch_size": 4, "num_blocks": 1, "embed_dim": 8}
    if block != "MixerBlock":
        sizes["mlp_ratio"] = 4
    model = shaken(mlp_mixer.MlpMixer(num_classes=CLASSES, block_layer=getattr(mlp_mixer, block), **sizes))
    return images(8, model, lambda b: model(b["pixel_values"]))


def denoiser(make: Callable[[Any], nn.Module], size: int, **given: Any) -> Program:
    """The noise of a noisy picture, by its time."""
    import diffusers

    model = shaken(make(diffusers))
    channels = 3
    batch = {
        "sample": torch.randn(N, channels, size, size),
        "timestep": torch.tensor([3, 500, 40]),
        "noise": torch.randn(N, channels, size, size),
    }
    batch |= {name: value() for name, value in given.items()}

    def outputs(b: dict[str, Tensor]) -> Tensor:
        kept = {name: value for name, value in b.items() if name not in ("sample", "noise")}
        return model(b["sample"], **kept).sample

    return Program(model, batch, sliced(batch, N), outputs, lambda z, b: F.mse_loss(z, b["noise"]))


def vision(**table: Any) -> list[Configuration]:
    return [
        Configuration(
            "transformers",
            f"images, {name}",
            partial(classifier, name.replace("_", "-") if name in DASHED else name, **options),
            ("transformers",),
        )
        for name, options in table.items()
    ]


DASHED = {"data2vec_vision"}
STAGES = {"image_size": 16, "embed_dim": 4, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 4}
VISION = [
    *vision(
        vit=VIT,
        dinov2=VIT,
        ijepa=VIT,
        vit_msn=VIT,
        beit=VIT,
        data2vec_vision=VIT,
        swin=STAGES | {"size": 16},
        swinv2=STAGES | {"size": 16, "image_size": 16},
        convnext={"hidden_sizes": [4, 6], "depths": [1, 1], "num_stages": 2, "size": 16},
        convnextv2={"hidden_sizes": [4, 6], "depths": [1, 1], "num_stages": 2, "size": 16},
        resnet={"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic", "size": 16},
        regnet={"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "groups_width": 2, "size": 16},
        poolformer={
            "hidden_sizes": [4, 6],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "padding": [1, 1],
            "size": 16,
        },
        segformer={
            "num_encoder_blocks": 2,
            "hidden_sizes": [4, 6],
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "num_attention_heads": [1, 2],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "mlp_ratios": [2, 2],
            "size": 16,
        },
        siglip={"vision_config": VIT},
    ),
    Configuration(
        "transformers",
        "images, CLIP's image tower under a linear head",
        partial(image_text, "linear"),
        ("transformers",),
    ),
    Configuration("transformers", "contrastive, CLIP", clip, ("transformers",)),
]
TIMM = [
    Configuration(
        "timm",
        name + (", training" if options.get("train") else ""),
        partial(timm_model, name, **options),
        ("timm", "torchvision"),
    )
    for name, options in (
        (
            "vit_tiny_patch16_224",
            {"img_size": 8, "size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2},
        ),
        (
            "deit3_small_patch16_224",
            {"img_size": 8, "size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2},
        ),
        (
            "eva02_tiny_patch14_224",
            {"img_size": 8, "size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2},
        ),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (4, 4, 6, 6)}),
        (
            "swin_tiny_patch4_window7_224",
            {
                "img_size": 16,
                "size": 16,
                "patch_size": 2,
                "window_size": 4,
                "embed_dim": 4,
                "depths": (1, 1),
                "num_heads": (1, 2),
            },
        ),
        ("cait_xxs24_224", {"img_size": 8, "size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}),
        (
            "pit_ti_224",
            {
                "img_size": 16,
                "size": 16,
                "patch_size": 4,
                "stride": 4,
                "base_dims": (4, 4),
                "depth": (1, 1),
                "heads": (1, 2),
            },
        ),
        (
            "xcit_nano_12_p16_224",
            {"img_size": 16, "size": 16, "embed_dim": 8, "depth": 1, "num_heads": 2, "cls_attn_layers": 1},
        ),
        ("resnet10t", {"block_args": {}, "layers": (1, 1, 1, 1), "channels": (4, 4, 6, 6), "stem_width": 4}),
        ("resnet10t", {"layers": (1, 1, 1, 1), "channels": (4, 4, 6, 6), "stem_width": 4, "train": True}),
        ("nf_resnet26", {"width_factor": 0.03}),
    )
]
TIMM += [
    Configuration("timm", f"MlpMixer of {block}s", partial(mixer, block), ("timm", "torchvision"))
    for block in ("MixerBlock", "ResBlock")
]
UNET = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
DIFFUSERS = [
    Configuration("diffusers", name, make, ("diffusers",))
    for name, make in (
        (
            "UNet2DModel",
            partial(
                denoiser,
                lambda d: d.UNet2DModel(
                    **UNET,
                    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                    attention_head_dim=4,
                ),
                8,
            ),
        ),
        (
            "UNet2DConditionModel",
            partial(
                denoiser,
                lambda d: d.UNet2DConditionModel(
                    **UNET,
                    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                    cross_attention_dim=6,
                    attention_head_dim=2,
                ),
                8,
                encoder_hidden_states=lambda: torch.randn(N, 2, 6),
            ),
        ),
        (
            "DiTTransformer2DModel",
            partial(
                denoiser,
                lambda d: d.DiTTransformer2DModel(
                    num_attention_heads=2,
                    attention_head_dim=4,
                    in_channels=3,
                    out_channels=3,
                    num_layers=1,
                    sample_size=4,
                    patch_size=2,
                    norm_num_groups=2,
                    num_embeds_ada_norm=10,
                ),
                4,
                class_labels=lambda: torch.tensor([1, 4, 2]),
            ),
        ),
    )
]
