"""SliME's logits check: the stages."""

from mindvlm.convert.parity.stages import STEP_LOGITS, Stage

MODELS = {
    "slime": {
        "tower_features": Stage("vision features", "vision_tower.*"),
        "tower_last_hidden": Stage("vision last layer", "vision_tower.encoder.layers.* behind the features"),
        "tower_pooled": Stage("vision last norm", "vision_tower.post_layernorm.*"),
        "global_resampled": Stage("global resampler", "mm_projector.attn.*"),
        "gates": Stage("gate", "mm_projector.w_gate"),
        "global_rows": Stage("global rows", "mm_projector.projection.*"),
        "local_resampled": Stage("local compression", "sampler.*"),
        "local_rows": Stage("local rows", "mm_projector.projection.*"),
        "connector": Stage("image rows", "language_model.embed_tokens.*, of which the separator is a row"),
        "router_scores": Stage("router scores", "language_model.embed_tokens.*, of which the text has rows"),
        "merged_embeddings": Stage("merged embeddings", "language_model.embed_tokens.*"),
        "layers": Stage("decoder layers", "language_model.layers.*, norm.*", stacked=True),
        "logits": Stage("logits", "language_model.lm_head.*"),
        STEP_LOGITS: Stage("logits with cache", "those of the decoder, used with its cache"),
    }
}
