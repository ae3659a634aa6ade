"""Vary's logits check: the stages of Vary-toy and Vary-tiny."""

from mindvlm.convert.parity.stages import Stage, decoder_stages

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
        **decoder_stages(),
    },
    "vary_tiny": {
        **_VOCABULARY,
        "connector": Stage("connector", "mm_projector.*"),
        **decoder_stages(before="embed_positions.*, ", head="language_model.embed_tokens.* as the head"),
    },
}
