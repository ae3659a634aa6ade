"""Vary's logits check: the stages of Vary-toy and Vary-tiny."""

from mindvlm.convert.parity.stages import STEP_LOGITS, Stage

_VOCABULARY = {
    "vocabulary_neck": Stage("vocabulary neck", "vision_vocabulary.* up to the neck"),
    "vocabulary_features": Stage("vocabulary features", "vision_vocabulary.net_2.*, net_3.*"),
}
MODELS = {
    "vary_toy": {
        "clip_features": Stage("CLIP features", "vision_tower.*"),
        "clip_last_hidden": Stage("CLIP last layer", "vision_tower.encoder.layers.* behind the features"),
        "clip_pooled": Stage("CLIP pooled", "vision_tower.post_layernorm.*"),
        **_VOCABULARY,
        "connector": Stage("connector", "mm_projector.*, mm_projector_vary.*"),
        "merged_embeddings": Stage("merged embeddings", "language_model.embed_tokens.*"),
        "layers": Stage("decoder layers", "language_model.layers.*, norm.*", stacked=True),
        "logits": Stage("logits", "language_model.lm_head.*"),
        STEP_LOGITS: Stage("logits with cache", "those of the decoder, used with its cache"),
    },
    "vary_tiny": {
        **_VOCABULARY,
        "connector": Stage("connector", "mm_projector.*"),
        "merged_embeddings": Stage("merged embeddings", "language_model.embed_tokens.*"),
        "layers": Stage("decoder layers", "language_model.embed_positions.*, layers.*, norm.*", stacked=True),
        "logits": Stage("logits", "language_model.embed_tokens.* as the head"),
        STEP_LOGITS: Stage("logits with cache", "those of the decoder, used with its cache"),
    },
}
