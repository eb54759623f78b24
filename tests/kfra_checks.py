"""KFRA on the programs of the zoo: which are no chains, and what brute force reads of the others."""

from __future__ import annotations

from typing import Any

import oracle
from quantity_checks import Drawn, Truth, check_forms, dense_factors

import layerwise as lw

__all__ = ["NO_CHAIN", "kfra"]

NO_CHAIN = {
    "affine_by_hand", "residual", "reused", "reused_at_two_shapes", "tied_embedding", "tied_autoencoder",
    "matmul_forms", "chunked", "seq_first_recurrent", "constant_start", "learned_start", "two_heads", "attention",
    "causal_lm", "attention_time_first", "attention_padded", "attention_cross", "attention_learned_queries",
    "transformer_post_norm", "transformer_pre_norm", "transformer_decoder", "vit", "char_gpt", "lstm",
    "lstm_stacked_both_ways", "lstm_projected", "gru", "gru_learned_start", "rnn_tanh", "rnn_relu_per_step", "cells",
    "checkpointed_attention", "checkpointed_transformer", "checkpointed_lstm", "checkpointed_gru",
}  # fmt: skip
# The oracle's hooks see module calls with one output, whose dim 0 is the samples'.
UNREAD = {
    "tokens_flat", "functional", "functional_conv", "seq_first_flat_square", "seq_first_square", "seq_first_pooled",
    "no_grad_gate", "multihead_attention",
    "autocast",
}  # fmt: skip
LAST = "the last layer's factors are KFLR's; brute force does not see the others'"

FORMS = "names and forms are KFLR's; values of these forms are tested on other models"


def kfra(truth: Truth, got: Any, _: Drawn) -> str | None:
    """Against the recursion by brute force; where that does not see the layers, the last one against KFLR."""
    instance, name = truth.fresh(), truth.case.problem.name
    with lw.observe(instance.subject, lw.KFLR()) as seen:
        instance.loss().backward()
    assert got.blocks.keys() == seen.kflr.blocks.keys()
    rows = check_forms(truth, got)
    have, last = dense_factors(got), next(reversed(seen.kflr.blocks))
    if set(got.forms.values()) != {"rows"}:
        return FORMS  # from gradients it is another average than KFLR's
    for a, b in zip(have[last], dense_factors(seen.kflr)[last], strict=True):
        oracle.assert_close(a, b, rel=truth.rel)
    if name in UNREAD:
        return LAST
    want = oracle.kfra_factors(instance.model, instance.logits, instance.loss_of)
    names = [n for n in want if n in truth.params]
    assert set(names) <= set(rows)
    for i in (0, 1):
        oracle.assert_close({n: have[n][i] for n in names}, {n: want[n][i] for n in names}, rel=truth.rel)
    return None if len(names) == len(truth.params) else LAST
