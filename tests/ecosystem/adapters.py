"""PEFT's methods on a small causal model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ecosystem.base import Configuration, Program, shaken, sliced
from ecosystem.language import GPT, KV, N, configured, shifted, tokens

__all__ = ["PEFT"]

LLAMA = {"num_hidden_layers": 1, **KV, "num_key_value_heads": 2}


def adapted(config: str, base: str = "llama", **options: Any) -> Program:
    """The base frozen, and what the method trains."""
    import peft

    model = configured(base, "AutoModelForCausalLM", LLAMA if base == "llama" else GPT)
    for p in model.parameters():
        p.requires_grad_(False)
    given = {"task_type": "CAUSAL_LM", **options}
    model = shaken(peft.get_peft_model(model, getattr(peft, config)(**given)))
    x = tokens()
    batch = {"input_ids": x, "labels": x}
    virtual = options.get("num_virtual_tokens", 0) * (config in ("PromptTuningConfig", "PromptEncoderConfig"))

    def loss_of(z: Tensor, b: dict[str, Tensor]) -> Tensor:
        """The last virtual token has the first one to say."""
        if not virtual:
            return shifted(z, b)
        return F.cross_entropy(z[:, virtual - 1 : -1].flatten(0, 1), b["labels"].flatten())

    return Program(model, batch, sliced(batch, N), lambda b: model(**b).logits, loss_of, lambda b: model(**b).loss)


QV = {"target_modules": ["q_proj", "v_proj"]}
SHAPE = {"num_layers": 1, "token_dim": 8, "num_attention_heads": 2, "num_virtual_tokens": 2}
PEFT = [
    Configuration("peft", name, partial(adapted, config, **options), ("peft", "transformers"))
    for name, config, options in (
        ("LoRA", "LoraConfig", {"r": 2, **QV}),
        (
            "LoRA, rank-stabilized, on all linear layers",
            "LoraConfig",
            {"r": 2, "use_rslora": True, "target_modules": "all-linear"},
        ),
        ("LoRA with trained biases", "LoraConfig", {"r": 2, "lora_bias": True, **QV}),
        (
            "LoRA on GPT-2's Conv1D",
            "LoraConfig",
            {"r": 2, "base": "gpt2", "target_modules": ["c_attn"], "fan_in_fan_out": True},
        ),
        ("LoRA on the embedding", "LoraConfig", {"r": 2, "target_modules": ["embed_tokens", "q_proj"]}),
        ("LoRA with a trained head", "LoraConfig", {"r": 2, "modules_to_save": ["lm_head"], **QV}),
        ("DoRA", "LoraConfig", {"r": 2, "use_dora": True, **QV}),
        ("AdaLoRA", "AdaLoraConfig", {"init_r": 2, "target_r": 1, "total_step": 10, **QV}),
        ("LoHa", "LoHaConfig", {"r": 2, **QV}),
        ("LoKr", "LoKrConfig", {"r": 2, **QV}),
        (
            "IA3",
            "IA3Config",
            {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        ),
        ("VeRA", "VeraConfig", {"r": 2, "target_modules": ["q_proj", "v_proj"], "projection_prng_key": 0}),
        ("FourierFT", "FourierFTConfig", {"n_frequency": 5, **QV}),
        ("BOFT", "BOFTConfig", {"boft_block_size": 4, **QV}),
        ("OFT", "OFTConfig", {"oft_block_size": 4, "r": 0, **QV}),
        ("HRA", "HRAConfig", {"r": 2, **QV}),
        ("LN tuning", "LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
        ("VB-LoRA", "VBLoRAConfig", {"r": 2, "num_vectors": 4, "vector_length": 4, "topk": 2, **QV}),
        ("RandLoRA", "RandLoraConfig", {"r": 2, **QV}),
        ("C3A", "C3AConfig", {"block_size": 4, **QV}),
        ("MiSS", "MissConfig", {"r": 2, **QV}),
        ("SHiRA", "ShiraConfig", {"r": 1, **QV}),
        ("RoAd", "RoadConfig", {"group_size": 2, **QV}),
        ("DeLoRA", "DeloraConfig", {"r": 2, **QV}),
        ("WaveFT", "WaveFTConfig", {"n_frequency": 5, **QV}),
        ("trainable tokens", "TrainableTokensConfig", {"token_indices": [3, 5], "target_modules": ["embed_tokens"]}),
        ("prompt tuning", "PromptTuningConfig", SHAPE),
        ("prefix tuning", "PrefixTuningConfig", SHAPE),
        (
            "prefix tuning with a projection",
            "PrefixTuningConfig",
            SHAPE | {"prefix_projection": True, "encoder_hidden_size": 6},
        ),
        ("p-tuning", "PromptEncoderConfig", SHAPE | {"encoder_hidden_size": 6}),
        (
            "p-tuning by an LSTM",
            "PromptEncoderConfig",
            SHAPE | {"encoder_hidden_size": 6, "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1},
        ),
        ("LLaMA adapters", "AdaptionPromptConfig", {"adapter_len": 2, "adapter_layers": 1}),
    )
]
