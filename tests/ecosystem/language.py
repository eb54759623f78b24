"""Language models of transformers: causal, masked, sequence to sequence, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ecosystem.base import Configuration, Program, shaken, sliced

__all__ = ["CAUSAL", "EXPERTS", "MASKED", "SEQ2SEQ"]

N, T, V = 3, 4, 11
SMALL = {
    "vocab_size": V,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
GPT = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "n_inner": 12}
D_MODEL = {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "decoder_start_token_id": 1,
}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 1}


def tokens() -> Tensor:
    """`[N, T]`: no padding, beginning or end."""
    return torch.randint(3, V, (N, T))


def configured(kind: str, auto: str, options: dict[str, Any], shared: dict[str, Any] = SMALL) -> Any:
    """A model of this architecture with small sizes."""
    import transformers

    given = {name: value for name, value in (shared | options).items() if value is not None}
    config = transformers.AutoConfig.for_model(kind, **given)
    return shaken(getattr(transformers, auto).from_config(config, experts_implementation="eager"))


def shifted(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a causal model."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def each(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a model that has a target at every position."""
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def program(model: Any, batch: dict[str, Tensor], loss_of: Callable[[Any, Any], Tensor], **options: Any) -> Program:
    """The model's own loss."""
    return Program(
        model, batch, sliced(batch, N), lambda b: model(**b).logits, loss_of, lambda b: model(**b).loss, **options
    )


def causal(kind: str, **options: Any) -> Program:
    """Next tokens."""
    x = tokens()
    return program(configured(kind, "AutoModelForCausalLM", options), {"input_ids": x, "labels": x}, shifted)


def masked(kind: str, **options: Any) -> Program:
    """A target at two positions of each sample."""
    x = tokens()
    y = torch.where(torch.tensor([True, False, True, False]), x, -100)
    mixed = kind == "nystromformer"  # the inverse that it iterates starts at the batch's largest value
    model = configured(kind, "AutoModelForMaskedLM", options)
    return program(model, {"input_ids": x, "labels": y}, each, mixed=mixed)


def seq2seq(kind: str, **options: Any) -> Program:
    """Another sequence from the first."""
    batch = {"input_ids": tokens(), "labels": tokens()}
    return program(configured(kind, "AutoModelForSeq2SeqLM", options), batch, each)


def rows(make: Callable[..., Program], what: str, table: dict[str, dict[str, Any]]) -> list[Configuration]:
    """A configuration for each architecture."""
    return [
        Configuration("transformers", f"{what}, {name}", partial(make, name, **options), ("transformers",))
        for name, options in table.items()
    ]


KV = {"num_key_value_heads": 1, "head_dim": 4}
CAUSAL = rows(
    causal,
    "causal",
    {
        "gpt2": GPT,
        "gpt_neo": {"num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
        "gptj": GPT | {"rotary_dim": 4},
        "gpt_neox": {},
        "gpt_bigcode": GPT,
        "codegen": GPT | {"n_head": 4, "n_embd": 16, "rotary_dim": 4},
        "openai-gpt": GPT,
        "opt": {"ffn_dim": 12, "word_embed_proj_dim": 8},
        "bloom": {"n_layer": 1, "n_head": 2},
        "mpt": {"d_model": 8, "n_heads": 2, "n_layers": 1, "max_seq_len": 16, "expansion_ratio": 2},
        "falcon": {},
        "llama": KV,
        "mistral": KV,
        "ministral": KV,
        "qwen2": KV,
        "qwen3": KV,
        "gemma": KV,
        "gemma2": KV,
        "gemma3_text": KV,
        "phi": {},
        "phi3": {},
        "olmo": {},
        "olmo2": {},
        "olmo3": {},
        "stablelm": KV | {"num_key_value_heads": 2, "partial_rotary_factor": 0.5},
        "starcoder2": KV,
        "cohere": KV,
        "cohere2": KV,
        "granite": KV,
        "glm": KV,
        "glm4": KV,
        "helium": KV,
        "nemotron": KV,
        "persimmon": {},
        "smollm3": KV,
        "exaone4": KV,
        "seed_oss": KV,
        "biogpt": {},
        "xglm": {"d_model": 8, "num_layers": 1, "attention_heads": 2, "ffn_dim": 12},
        "mamba": {"state_size": 3, "expand": 2, "conv_kernel": 2, "time_step_rank": 2},
        "mamba2": {
            "state_size": 4,
            "expand": 2,
            "conv_kernel": 2,
            "n_groups": 1,
            "num_heads": 4,
            "head_dim": 4,
            "chunk_size": 4,
        },
        "falcon_mamba": {"state_size": 3, "expand": 2, "conv_kernel": 2, "time_step_rank": 2},
        "rwkv": {"attention_hidden_size": 8, "num_hidden_layers": 2},
        "recurrent_gemma": {"lru_width": 8, "num_key_value_heads": 1, "num_hidden_layers": 3},
        "nanochat": KV,
        "diffllama": KV | {"num_key_value_heads": 2},
        "bitnet": KV,
        "ctrl": {"n_embd": 8, "dff": 12, "n_layer": 1, "n_head": 2},
        "hunyuan_v1_dense": KV,
        "apertus": KV,
        "arcee": KV,
        "lfm2": KV | {"full_attn_idxs": [0]},
    },
)
MOE = KV | {
    "num_experts": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "router_jitter_noise": 0.0,
}
EXPERTS = rows(
    causal,
    "experts",
    {
        "mixtral": MOE,
        "qwen2_moe": MOE | {"shared_expert_intermediate_size": 6},
        "qwen3_moe": MOE,
        "olmoe": MOE,
        "phimoe": MOE,
        "granitemoe": MOE,
        "gpt_oss": MOE,
        "deepseek_v3": MOE
        | {
            "num_experts": 4,
            "num_local_experts": 4,
            "q_lora_rank": 4,
            "kv_lora_rank": 4,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 2,
            "v_head_dim": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 2,
            "num_key_value_heads": 2,
            "first_k_dense_replace": 0,
        },
        "jetmoe": MOE,
        "ernie4_5_moe": MOE,
        "minimax": MOE,
        "flex_olmo": MOE,
        "glm4_moe": MOE,
    },
)
MASKED = rows(
    masked,
    "masked",
    {
        "bert": {},
        "roberta": {},
        "xlm-roberta": {},
        "camembert": {},
        "electra": {"embedding_size": 6},
        "albert": {"embedding_size": 6},
        "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 4},
        "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 4},
        "distilbert": {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 12},
        "mpnet": {},
        "modernbert": {},
        "convbert": {"embedding_size": 8, "head_ratio": 1, "num_groups": 1},
        "squeezebert": {
            "embedding_size": 8,
            "q_groups": 1,
            "k_groups": 1,
            "v_groups": 1,
            "post_attention_groups": 1,
            "intermediate_groups": 1,
            "output_groups": 1,
        },
        "fnet": {},
        "nystromformer": {"num_landmarks": 2, "segment_means_seq_len": 4, "conv_kernel_size": 3},
        "rembert": {"input_embedding_size": 6, "output_embedding_size": 6},
        "roformer": {},
        "mobilebert": {"embedding_size": 6, "intra_bottleneck_size": 4, "true_hidden_size": 4},
        "esm": {"mask_token_id": 2},
        "ernie": {},
        "megatron-bert": {},
        "xlm": {"emb_dim": 8, "n_layers": 1, "n_heads": 2},
        "funnel": {
            "num_hidden_layers": None,
            "block_sizes": [1],
            "d_model": 8,
            "n_head": 2,
            "d_head": 4,
            "d_inner": 12,
        },
        "longformer": {"attention_window": 4},
        "big_bird": {"attention_type": "original_full"},
        "roc_bert": {
            "pronunciation_vocab_size": 5,
            "pronunciation_embed_dim": 3,
            "shape_vocab_size": 5,
            "shape_embed_dim": 3,
            "concat_input": False,
        },
        "ibert": {},
        "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
        "yoso": {"use_expectation": True},
    },
)
SEQ2SEQ = rows(
    seq2seq,
    "sequence to sequence",
    {
        "t5": T5,
        "mt5": T5,
        "umt5": T5,
        "switch_transformers": T5
        | {
            "num_experts": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "router_jitter_noise": 0.0,
        },
        "longt5": T5 | {"local_radius": 2, "global_block_size": 2},
        "bart": D_MODEL,
        "mbart": D_MODEL,
        "pegasus": D_MODEL,
        "blenderbot": D_MODEL,
        "blenderbot-small": D_MODEL,
        "marian": D_MODEL,
        "m2m_100": D_MODEL,
        "plbart": D_MODEL,
        "mvp": D_MODEL,
        "pegasus_x": D_MODEL | {"num_global_tokens": 2, "block_size": 2},
        "led": D_MODEL | {"attention_window": 4},
        "fsmt": D_MODEL | {"src_vocab_size": V, "tgt_vocab_size": V, "langs": ["en", "de"]},
    },
)
