"""A tiny configuration of any model type: its default one, every size cut down by its name."""

from __future__ import annotations

import re
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 1024
HEADS, HEAD_DIM = 4, 16
HIDDEN = HEADS * HEAD_DIM
LAYERS = 2

# At most this, by the field's name; the first pattern that matches the whole name counts.
_AT_MOST: list[tuple[str, int]] = [
    (r"(.*_)?vocab_size|vocabulary_size|vocab_size_per_layer_input", VOCABULARY),
    (r"qk_(rope|nope)_head_dim|hidden_act_dim|rotary_dim|mamba_dt_rank|laurel_rank", 8),
    (r"(q|kv|o)_lora_rank|index_head_dim|hidden_size_per_layer_input", 16),
    (r"(mamba_)?d_state|(ssm_)?state_size|mamba_d_state|linear_(key|value)_head_dim", 16),
    (r"mamba_(n|num)_heads", 8),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"linear_num_(key|value)_heads|index_n_heads|index_topk|.*num_(local_)?experts", 4),
    (r"n_routed_experts|num_routed_experts|moe_num_experts|window_size|attention_window", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|experts_per_token", 2),
    (r"num_selected_experts|moe_num_active_experts|o_groups|altup_num_inputs", 2),
    (r"n_group|topk_group|mamba_n_groups|n_groups|num_mem_blocks|first_k_dense_replace", 1),
    (r"num_nextn_predict_layers|mtp_num_hidden_layers", 0),
    (r"sliding_window(_size)?|swa_window_size|window", 5),
    (r"attention_chunk_size|local_attention", 6),
    (r"max_position_embeddings|n_positions|n_ctx|max_target_positions", 256),
    (r"max_2d_position_embeddings", 256),
    (r"max_source_positions", 64),
    (r"num_mel_bins|input_feat_per_channel|num_codebook_vectors", 32),
    (r"conv_depthwise_kernel_size|conv_kernel_size|adapter_kernel_size", 3),
    (r"num_conv_pos_embeddings", 16),
    (r"num_conv_pos_embedding_groups", 2),
    (r"image_size|img_size|input_size|max_image_size|crop_size", 32),
    (r"patch_size", 8),
    (r"tubelet_size", 2),
    (r"num_frames|mm_tokens_per_image|num_image_tokens|num_query_tokens", 4),
    (r"num_queries", 8),
    (r"num_position_embeddings", 16),
    (r"n_layers?|(.*_)?num_layers|(.*_)?num_hidden_layers|num_attention_layers", LAYERS),
    (r"(.*_)?depth|(.*_)?(en|de)coder_layers|[ed]_layers|(en|de)coder_num_layers", LAYERS),
    (r"n_enc_layers|.*_layers_num", LAYERS),
    (r"n_heads?|(.*_)?num_heads|(.*_)?attention_heads|num_q_heads", HEADS),
    (r"head_dim|.*_head_dim|d_kv|.*head_size|kv_channels", HEAD_DIM),
    (r"(.*_)?hidden_size|d_model|n_embd?|embed_dim|n_embed|dim|model_dim|text_embed_dim", HIDDEN),
    (r"embedding_(size|dim)|hidden_dim|emb_dim|projection_(dim|size)|output_dim", HIDDEN),
    (r"proj_dim|mm_embed_dim|decoder_hidden_dim|word_embed_proj_dim", HIDDEN),
    (r".*intermediate_(size|dim)|(.*)ffn_dim|n_inner|d_ff|ffn_hidden_size", 96),
    (r"dim_feedforward|mlp_dim|.*mlp_hidden_size|linear_units|inner_dim", 96),
]  # fmt: skip
_KV_HEADS = re.compile(r"(.*_)?num_(key_value|kv)_heads|n_kv_heads|.*_key_value_heads")
_TOKEN = re.compile(r".*_token_(id|index|idx)|token_ids?")
_DROPPED = {
    "transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path", "id2label",
    "label2id", "attn_implementation", "_attn_implementation", "out_features", "out_indices",
    "_out_features", "_out_indices", "stage_names",
}  # fmt: skip
_MROPE = re.compile(
    r"qwen2_(5_)?(vl|omni)|glm(4|46)v|glmga|glm_(image|ocr)|paddleocr|qwen3_(vl|omni)|ernie4_5_vl"
    r"|hy_v4_vl|exaone4_5"
)
# By model type, where fields depend on each other.
_CHANGES: dict[str, dict[str, Any]] = {
    "esm": {"vocab_size": 40, "mask_token_id": 32},
    "autoformer": {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3]},
    "informer": {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3]},
    "time_series_transformer": {
        "prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3],
    },
    "mobilebert": {"true_hidden_size": HIDDEN, "intra_bottleneck_size": HIDDEN},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "nemotron": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM, "moe_topk": 2, "num_experts": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "xlnet": {"d_head": HEAD_DIM},
    "mamba2": {"num_heads": 8, "head_dim": HEAD_DIM},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "glm5_next_text": {"index_topk": 16},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": HEAD_DIM},
}  # fmt: skip


def tiny_configuration(model_type: str) -> Any:
    """Raises what transformers raises where fields do not fit together."""
    kind = CONFIG_MAPPING[model_type]
    fields = _shrink(kind().to_dict())
    fields.pop("model_type", None)
    fields.update(_CHANGES.get(model_type, {}))
    config = kind.from_dict(fields)
    _without_dropout(config)
    return config


def _kept_layers(fields: dict[str, Any]) -> list[int] | None:
    """One layer of each type where the layers have types, two where all have the same."""
    types = fields.get("layer_types") or fields.get("layers_block_type")
    if not isinstance(types, list) or not types:
        return None
    kept = [i for i, kind in enumerate(types) if kind not in types[:i]]
    return kept if len(kept) > 1 else list(range(min(LAYERS, len(types))))


def _shrink(fields: dict[str, Any]) -> dict[str, Any]:
    fields = dict(fields)
    kept = _kept_layers(fields)
    total = len(fields.get("layer_types") or fields.get("layers_block_type") or []) if kept else -1
    latent = "qk_rope_head_dim" in fields
    if "head_dim" in fields:
        fields["head_dim"] = 8 if latent else fields["head_dim"] or HEAD_DIM
    # Stages of growing width (Swin): sizes hang together, only images become smaller.
    staged = isinstance(fields.get("num_heads"), list) or "depths" in fields
    small = {}
    for name, value in fields.items():
        if name in _DROPPED:
            continue
        if name == "per_layer_config" and isinstance(value, dict):
            chosen = kept or range(LAYERS)
            each = {i: value.get(j, value.get(str(j))) for i, j in enumerate(chosen)}
            small[name] = {i: _shrink(layer) for i, layer in each.items() if layer is not None}
        elif isinstance(value, dict):
            small[name] = _shrink_nested(name, value, fields, latent)
        elif isinstance(value, list) and kept and len(value) == total:
            small[name] = [value[i] for i in kept]
        elif isinstance(value, int) and not isinstance(value, bool):
            if not staged or re.fullmatch(r"image_size|img_size|input_size|vocab_size", name):
                value = _shrink_number(name, value, fields, len(kept) if kept else LAYERS)
            small[name] = value
        else:
            small[name] = value
    return small


def _shrink_number(name: str, value: int, fields: dict[str, Any], layers: int) -> int:
    if _TOKEN.fullmatch(name):
        # Distinct ones stay distinct, above the tokens that the tests draw.
        return value if value < VOCABULARY - 40 else VOCABULARY - 40 + sum(map(ord, name)) % 38
    if _KV_HEADS.fullmatch(name):
        heads = fields.get("num_attention_heads") or fields.get("n_head") or value + 1
        return value if value == 1 else HEADS // 2 if value < heads else HEADS
    for pattern, limit in _AT_MOST:
        if re.fullmatch(pattern, name):
            whole = name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
            return min(value, layers if whole else limit)
    return value


def _shrink_nested(
    name: str, value: dict[str, Any], fields: dict[str, Any], latent: bool
) -> dict[str, Any]:
    if name in ("rope_parameters", "rope_scaling"):
        sections = _MROPE.search(str(fields.get("model_type"))) or "mrope_section" in value
        if sections and ("rope_theta" in value or "rope_type" in value):
            width = (8 if latent else HEAD_DIM) * float(value.get("partial_rotary_factor", 1.0))
            pairs = int(width) // 2
            first, second = pairs // 4, (pairs - pairs // 4) // 2
            return {**value, "mrope_section": [first, second, pairs - first - second]}
        return value
    return _shrink(value) if "config" in name or "model_type" in value else value


def _without_dropout(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
    for name in getattr(config, "sub_configs", {}):
        nested = getattr(config, name, None)
        if nested is not None and not isinstance(nested, dict):
            _without_dropout(nested)
