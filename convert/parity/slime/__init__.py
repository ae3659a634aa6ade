"""SliME's logits check: the stages."""

from mindvlm.convert.parity.stages import TOWER_STAGES, Stage, decoder_stages

MODELS = {
    "slime": {
        **TOWER_STAGES,
        "global_resampled": Stage("global resampler", "mm_projector.attn.*"),
        "gates": Stage("gate", "mm_projector.w_gate"),
        "global_rows": Stage("global rows", "mm_projector.projection.*"),
        "local_resampled": Stage("local compression", "sampler.*"),
        "local_rows": Stage("local rows", "mm_projector.projection.*"),
        "connector": Stage("image rows", "language_model.embed_tokens.*, of which the separator is a row"),
        "router_scores": Stage("router scores", "language_model.embed_tokens.*, of which the text has rows"),
        **decoder_stages(),
    }
}
