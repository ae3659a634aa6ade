"""DeLVM's logits check: the stages, which are the same for both decoders."""

from mindvlm.convert.parity.stages import STEP_LOGITS, Stage

_DELVM = {
    "latent": Stage("latent of a picture", "vqgan.encoder.*, quant_conv.*"),
    "decoded": Stage("picture of codes", "vqgan.quantize.*, post_quant_conv.*, decoder.*"),
    "merged_embeddings": Stage("code embeddings", "language_model.embed_tokens.*"),
    "layers": Stage("decoder layers", "language_model.layers.*, norm.*", stacked=True),
    "logits": Stage("logits", "language_model.lm_head.*"),
    STEP_LOGITS: Stage("logits with cache", "those of the decoder, used with its cache"),
}
MODELS = {"delvm": _DELVM, "delvm_vit": _DELVM}
