"""The tensors of Vary models under Hugging Face and MindOCR names, written out from the published shapes."""

import numpy as np

from mindvlm.checkpoint import RawTensor, TensorInfo

TOY = dict(
    hidden=2048, layers=24, mlp=5504, vocab=151860,
    clip=1024, clip_layers=24, clip_mlp=4096, clip_patch=14, clip_rows=257,
    sam=768, sam_layers=12, sam_head=64, sam_global=(2, 5, 8, 11), sam_grid=64, necks=(256, 512, 1024), projected=1024,
)  # fmt: skip
SMALL = dict(
    hidden=8, layers=2, mlp=12, vocab=20,
    clip=6, clip_layers=3, clip_mlp=10, clip_patch=2, clip_rows=5,
    sam=8, sam_layers=3, sam_head=4, sam_global=(1,), sam_grid=4, necks=(4, 5, 6), projected=4,
)  # fmt: skip

TINY = dict(
    hidden=768, layers=12, mlp=3072, vocab=50268, positions=4098,
    sam=768, sam_layers=12, sam_head=64, sam_global=(2, 5, 8, 11), sam_grid=64, necks=(256, 512, 1024),
)  # fmt: skip
SMALL_TINY = dict(
    hidden=6, layers=2, mlp=10, vocab=20, positions=14,
    sam=8, sam_layers=3, sam_head=4, sam_global=(1,), sam_grid=4, necks=(4, 5, 6),
)  # fmt: skip


def hf_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    d, shapes = c["hidden"], {}
    shapes["transformer.wte.weight"] = shapes["lm_head.weight"] = (c["vocab"], d)
    shapes["transformer.ln_f.weight"] = (d,)
    for i in range(c["layers"]):
        h = f"transformer.h.{i}."
        shapes |= {h + "ln_1.weight": (d,), h + "ln_2.weight": (d,), h + "attn.c_proj.weight": (d, d)}
        shapes |= {h + "attn.c_attn.weight": (3 * d, d), h + "attn.c_attn.bias": (3 * d,)}
        shapes |= {h + "mlp.w1.weight": (c["mlp"], d), h + "mlp.w2.weight": (c["mlp"], d)}
        shapes[h + "mlp.c_proj.weight"] = (d, c["mlp"])

    def linear(name, rows, columns):
        shapes[f"{name}.weight"] = (rows, columns)
        shapes[f"{name}.bias"] = (rows,)

    def norm(name, size):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    linear("transformer.mm_projector", c["projected"], c["clip"])
    linear("transformer.mm_projector_vary", c["projected"], c["necks"][2])
    v, w = "transformer.vision_tower.vision_model.", c["clip"]
    shapes[v + "embeddings.class_embedding"] = (w,)
    shapes[v + "embeddings.patch_embedding.weight"] = (w, 3, c["clip_patch"], c["clip_patch"])
    shapes[v + "embeddings.position_embedding.weight"] = (c["clip_rows"], w)
    norm(v + "pre_layrnorm", w)
    norm(v + "post_layernorm", w)
    for i in range(c["clip_layers"]):
        layer = f"{v}encoder.layers.{i}."
        for name in "qkv":
            linear(f"{layer}self_attn.{name}_proj", w, w)
        linear(layer + "self_attn.out_proj", w, w)
        norm(layer + "layer_norm1", w)
        norm(layer + "layer_norm2", w)
        linear(layer + "mlp.fc1", c["clip_mlp"], w)
        linear(layer + "mlp.fc2", w, c["clip_mlp"])
    return shapes | sam_shapes(c, "transformer.vision_tower_high.")


def sam_shapes(c: dict, prefix: str) -> dict[str, tuple[int, ...]]:
    shapes = {}

    def linear(name, rows, columns):
        shapes[f"{name}.weight"] = (rows, columns)
        shapes[f"{name}.bias"] = (rows,)

    def norm(name, size):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    s, e, (n0, n1, n2) = prefix, c["sam"], c["necks"]
    shapes[s + "pos_embed"] = (1, c["sam_grid"], c["sam_grid"], e)
    shapes |= {s + "patch_embed.proj.weight": (e, 3, 16, 16), s + "patch_embed.proj.bias": (e,)}
    for i in range(c["sam_layers"]):
        block = f"{s}blocks.{i}."
        norm(block + "norm1", e)
        norm(block + "norm2", e)
        linear(block + "attn.qkv", 3 * e, e)
        linear(block + "attn.proj", e, e)
        rows = 2 * c["sam_grid"] - 1 if i in c["sam_global"] else 27
        shapes[block + "attn.rel_pos_h"] = shapes[block + "attn.rel_pos_w"] = (rows, c["sam_head"])
        linear(block + "mlp.lin1", 4 * e, e)
        linear(block + "mlp.lin2", e, 4 * e)
    shapes |= {s + "neck.0.weight": (n0, e, 1, 1), s + "neck.2.weight": (n0, n0, 3, 3)}
    norm(s + "neck.1", n0)
    norm(s + "neck.3", n0)
    shapes |= {s + "net_2.weight": (n1, n0, 3, 3), s + "net_3.weight": (n2, n1, 3, 3)}
    return shapes


def tiny_shapes(c: dict, tower: str = "vision_tower_2") -> dict[str, tuple[int, ...]]:
    d, m, shapes = c["hidden"], c["mlp"], {}
    decoder = "model.decoder."
    shapes["lm_head.weight"] = shapes[decoder + "embed_tokens.weight"] = (c["vocab"], d)
    shapes[decoder + "embed_positions.weight"] = (c["positions"], d)
    shapes |= {decoder + "final_layer_norm.weight": (d,), decoder + "final_layer_norm.bias": (d,)}
    for i in range(c["layers"]):
        layer = f"{decoder}layers.{i}."
        rows = {f"self_attn.{part}_proj": (d, d) for part in ("q", "k", "v", "out")} | {"fc1": (m, d), "fc2": (d, m)}
        rows |= {"self_attn_layer_norm": (d,), "final_layer_norm": (d,)}
        for name, shape in rows.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    shapes |= {"model.mm_projector.weight": (d, c["necks"][2]), "model.mm_projector.bias": (d,)}
    return shapes | sam_shapes(c, f"model.{tower}.")


def sam_file_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """A SAM as published: no net_2 and net_3, but a prompt encoder and a mask decoder."""
    shapes = {name: shape for name, shape in sam_shapes(c, "image_encoder.").items() if ".net_" not in name}
    shapes["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"] = (2, 4)
    shapes["prompt_encoder.point_embeddings.3.weight"] = (1, 8)
    shapes["mask_decoder.transformer.layers.1.self_attn.q_proj.bias"] = (8,)
    return shapes


def transformers_sam_name(name: str) -> str:
    """Returns the name in transformers' SamModel of a tensor of Meta's SAM."""
    pieces = {
        "image_encoder.blocks.": "vision_encoder.layers.",
        "image_encoder.patch_embed.proj.": "vision_encoder.patch_embed.projection.",
        "image_encoder.neck.0.": "vision_encoder.neck.conv1.",
        "image_encoder.neck.1.": "vision_encoder.neck.layer_norm1.",
        "image_encoder.neck.2.": "vision_encoder.neck.conv2.",
        "image_encoder.neck.3.": "vision_encoder.neck.layer_norm2.",
        "image_encoder.": "vision_encoder.",
        ".norm1.": ".layer_norm1.",
        ".norm2.": ".layer_norm2.",
    }
    for old, new in pieces.items():
        name = name.replace(old, new)
    return name


def transformers_sam_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """The same SAM as transformers has it."""
    shapes = {transformers_sam_name(name): shape for name, shape in sam_file_shapes(c).items()}
    return shapes | {"shared_image_embedding.positional_embedding": (2, 4)}


def clip_file_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """A whole CLIP as Hugging Face publishes it."""
    tower = "transformer.vision_tower."
    shapes = {name.removeprefix(tower): s for name, s in hf_shapes(c).items() if name.startswith(tower)}
    shapes["vision_model.embeddings.position_ids"] = (1, c["clip_rows"])
    shapes |= {"text_model.embeddings.token_embedding.weight": (9, 4), "text_model.final_layer_norm.bias": (4,)}
    shapes |= {"text_model.encoder.layers.11.mlp.fc1.weight": (4, 4), "logit_scale": ()}
    shapes |= {"text_projection.weight": (4, 4), "visual_projection.weight": (4, c["clip"])}
    return shapes


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: str = "bfloat16", seed: int = 3) -> dict[str, RawTensor]:
    """Random bits of a 16-bit dtype; tied names of Vary-tiny hold the same."""
    generator = np.random.default_rng(seed)
    storage = np.uint16 if dtype == "bfloat16" else np.dtype(dtype)
    tensors = {
        name: RawTensor(dtype, shape, generator.integers(0, 2**16, shape, np.uint16).view(storage))
        for name, shape in shapes.items()
    }
    if "model.decoder.embed_tokens.weight" in tensors and "lm_head.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
    return tensors


def infos(shapes: dict[str, tuple[int, ...]], dtype: str = "bfloat16") -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, dtype, shape) for name, shape in shapes.items()}


def mindocr_name(name: str) -> str:
    """The name that MindOCR's converter gives a tensor: substring replacements in its order."""
    for old, new in (
        (".h.", ".layers."), (".wte.weight", ".wte.embedding_weight"), ("attn.c_proj.", "attention.wo."),
        ("ln_1.", "attention_norm."), ("ln_2.", "ffn_norm."), ("mlp.w1.", "feed_forward.w1."),
        ("mlp.w2.", "feed_forward.w3."), ("mlp.c_proj.", "feed_forward.w2."),
        ("vision_model.", ""), ("embeddings.", ""), ("patch_embedding.", "conv1."),
        ("position_embedding.weight", "positional_embedding"), ("pre_layrnorm.weight", "ln_pre.gamma"),
        ("pre_layrnorm.bias", "ln_pre.beta"), ("encoder.layers", "transformer.resblocks"),
        ("layer_norm1.weight", "ln_1.gamma"), ("layer_norm1.bias", "ln_1.beta"),
        ("fc1", "c_fc"), ("fc2", "c_proj"),
        ("layer_norm2.weight", "ln_2.gamma"), ("layer_norm2.bias", "ln_2.beta"),
        ("self_attn", "attn"), ("post_layernorm", "vision_model.post_layernorm"),
        ("norm1.weight", "norm1.gamma"), ("norm1.bias", "norm1.beta"),
        ("norm2.weight", "norm2.gamma"), ("norm2.bias", "norm2.beta"),
    ):  # fmt: skip
        name = name.replace(old, new)
    return name
