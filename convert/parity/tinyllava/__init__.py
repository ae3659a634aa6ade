"""TinyLLaVA's logits check: the stages, which are the same for all its decoders."""

from mindvlm.convert.parity.stages import TOWER_STAGES, Stage, decoder_stages

_TINYLLAVA = {**TOWER_STAGES, "connector": Stage("connector", "mm_projector.*"), **decoder_stages()}
MODELS = dict.fromkeys(("tinyllava_phi", "tinyllava_stablelm", "tinyllava_llama"), _TINYLLAVA)
