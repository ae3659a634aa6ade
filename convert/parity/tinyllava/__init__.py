"""TinyLLaVA's logits check: the stages, which are the same for all its decoders."""

from mindvlm.convert.parity.stages import STEP_LOGITS, Stage

_TINYLLAVA = {
    "tower_features": Stage("vision features", "vision_tower.*"),
    "tower_last_hidden": Stage("vision last layer", "vision_tower.encoder.layers.* behind the features"),
    "tower_pooled": Stage("vision last norm", "vision_tower.post_layernorm.*"),
    "connector": Stage("connector", "mm_projector.*"),
    "merged_embeddings": Stage("merged embeddings", "language_model.embed_tokens.*"),
    "layers": Stage("decoder layers", "language_model.layers.*, norm.*", stacked=True),
    "logits": Stage("logits", "language_model.lm_head.*"),
    STEP_LOGITS: Stage("logits with cache", "those of the decoder, used with its cache"),
}
MODELS = dict.fromkeys(("tinyllava_phi", "tinyllava_stablelm", "tinyllava_llama"), _TINYLLAVA)
