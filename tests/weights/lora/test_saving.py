"""Adapters that are written in PEFT's layout: read by this library's merge and by PEFT itself."""

import numpy as np
import peft
import pytest
import torch

from mindvlm.checkpoint import MemorySource, RawTensor
from mindvlm.core.errors import UserError
from mindvlm.models.slime.hf_config import from_hf_config
from mindvlm.models.slime.names import HF as SLIME
from mindvlm.models.slime.names import infos_of as slime_infos
from mindvlm.models.vary.names import HF
from mindvlm.weights.lora.adapter import open_adapter
from mindvlm.weights.lora.merging import adapted_view
from mindvlm.weights.lora.saving import AdapterFiles
from mindvlm.weights.rules.planning import make_plan
from tests.known_models import MODELS, VARY
from tests.tiny_slime import CONFIG, TOWER
from tests.tiny_vary import tiny_config, tiny_weights

TOY = MODELS["vary_toy"]
RANK, ALPHA = 2, 5.0
ATTENTION = "language_model.layers.{}.self_attn.{}_proj"
ADAPTED = [
    *(ATTENTION.format(i, part) for i, part in ((0, "q"), (0, "k"), (0, "v"), (1, "k"), (0, "o"))),
    "language_model.layers.1.mlp.up_proj",
    "vision_vocabulary.blocks.1.attn.qkv",
    "language_model.lm_head",
]
WHOLE = ["mm_projector.weight", "language_model.norm.weight", "language_model.embed_tokens.weight"]


@pytest.fixture(scope="module")
def base() -> dict[str, np.ndarray]:
    return tiny_weights(tiny_config(), seed=1)


def factors(base, adapted) -> dict[str, np.ndarray]:
    """Random factors, and other values for what trains whole."""
    rng = np.random.default_rng(4)
    made = {name: rng.standard_normal(base[name].shape).astype(np.float32) for name in WHOLE}
    for name in adapted:
        rows, columns = base[f"{name}.weight"].shape
        made[f"{name}.lora_A"] = rng.standard_normal((RANK, columns)).astype(np.float32)
        made[f"{name}.lora_B"] = rng.standard_normal((rows, RANK)).astype(np.float32)
    return made


def write(folder, base, *, adapted=ADAPTED, whole=WHOLE):
    files = AdapterFiles(
        MODELS["vary_toy"], MemorySource(base).infos, adapted, whole, rank=RANK, alpha=ALPHA, dropout=0.1
    )
    trained = factors(base, adapted)
    folder.mkdir(exist_ok=True)
    files.write(folder, {name: RawTensor.from_array((base | trained)[name]) for name in files.needed})
    return trained


def expected(base, trained, adapted=ADAPTED) -> dict[str, np.ndarray]:
    merged = base | {name: trained[name] for name in WHOLE}
    for name in adapted:
        change = trained[f"{name}.lora_B"].astype(np.float64) @ trained[f"{name}.lora_A"]
        merged[f"{name}.weight"] = base[f"{name}.weight"] + ALPHA / RANK * change
    return merged


def test_what_is_written_is_merged(base, tmp_path):
    trained = write(tmp_path, base)
    wanted = expected(base, trained)
    with adapted_view(MemorySource(base), tmp_path, VARY) as merged:
        assert merged.infos.keys() == base.keys()
        for name, values in wanted.items():
            np.testing.assert_allclose(merged.read(name).data, values, rtol=1e-5, atol=1e-5, err_msg=name)
    with open_adapter(tmp_path) as adapter:
        assert adapter.config.rank_of("transformer.h.0.attn.c_attn") == 3 * RANK
        assert adapter.config.rank_of("transformer.h.1.attn.c_attn") == RANK
        assert set(adapter.config.modules_to_save) == {
            "transformer.mm_projector",
            "transformer.ln_f",
            "transformer.wte",
        }


def test_a_part_of_a_fused_tensor_takes_the_rest_from_the_base(base, tmp_path):
    name = ATTENTION.format(0, "v") + ".bias"
    files = AdapterFiles(
        MODELS["vary_toy"], MemorySource(base).infos, ADAPTED[-1:], [name], rank=RANK, alpha=ALPHA, dropout=0.0
    )
    assert {ATTENTION.format(0, part) + ".bias" for part in "qkv"} <= set(files.needed)
    values = base | {f"{ADAPTED[-1]}.lora_{x}": np.ones(s, np.float32) for x, s in (("A", (2, 32)), ("B", (270, 2)))}
    values[name] = base[name] + 1
    made = files.tensors({key: RawTensor.from_array(value) for key, value in values.items()})
    fused = made["base_model.model.transformer.h.0.attn.c_attn.bias"].data
    np.testing.assert_array_equal(fused[:64], np.concatenate([base[name.replace("v_", f"{p}_")] for p in "qk"]))
    np.testing.assert_array_equal(fused[64:], base[name] + 1)


@pytest.mark.parametrize(
    ("adapted", "whole", "module"),
    [
        (ADAPTED[0], ATTENTION.format(0, "v") + ".bias", "transformer.h.0.attn.c_attn trains whole"),
        (ADAPTED[6], "vision_vocabulary.pos_embed", "transformer.vision_tower_high trains whole"),
    ],
)
def test_what_peft_cannot_hold_is_refused(base, adapted, whole, module):
    with pytest.raises(UserError, match=f"something of {module} and transformer.* is adapted"):
        AdapterFiles(TOY, MemorySource(base).infos, [adapted], [whole], rank=2, alpha=2.0, dropout=0.0)


def test_dtypes_stay(base, tmp_path):
    bits = {name: RawTensor.from_array(value).cast("bfloat16") for name, value in base.items()}
    files = AdapterFiles(
        MODELS["vary_toy"], MemorySource(bits).infos, ADAPTED, WHOLE, rank=RANK, alpha=ALPHA, dropout=0.0
    )
    trained = {n: RawTensor.from_array(v).cast("bfloat16") for n, v in factors(base, ADAPTED).items()}
    made = files.tensors(bits | trained)
    assert {tensor.dtype for tensor in made.values()} == {"bfloat16"}
    b = made["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].to_float32()
    np.testing.assert_array_equal(b[32:64, 2:4], trained[f"{ADAPTED[1]}.lora_B"].to_float32())


def torch_module(source) -> torch.nn.Module:
    """Returns modules with the names and values of published tensors, for PEFT."""
    root = torch.nn.Module()
    for name, info in source.infos.items():
        *path, ending = name.split(".")
        place = root
        for part in path[:-1]:
            if part not in dict(place.named_children()):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        if path[-1] not in dict(place.named_children()):
            weight = source.infos[".".join((*path, "weight"))] if ending in ("weight", "bias") else None
            is_matrix = weight is not None and len(weight.shape) == 2
            has_bias = ".".join((*path, "bias")) in source.infos
            if path[-1] in ("wte", "embed_tokens"):
                place.add_module(path[-1], torch.nn.Embedding(*info.shape))
            else:
                linear = torch.nn.Linear(*weight.shape[::-1], bias=has_bias) if is_matrix else torch.nn.Module()
                place.add_module(path[-1], linear)
        place = getattr(place, path[-1])
        setattr(place, ending, torch.nn.Parameter(torch.tensor(np.array(source.read(name).data))))
    root.prepare_inputs_for_generation = None
    return root


def test_peft_merges_the_same(base, tmp_path):
    """PEFT itself, on modules with the names of the published files."""
    adapted = [name for name in ADAPTED if "vision" not in name]
    trained = write(tmp_path, base, adapted=adapted)

    def published(tensors):
        source = MemorySource({name: np.asarray(value, np.float32) for name, value in tensors.items()})
        return make_plan(HF.reverse(), source.infos).view(source)

    before, wanted = published(base), published(expected(base, trained, adapted))
    root = torch_module(before)
    merged = peft.PeftModel.from_pretrained(root, str(tmp_path)).merge_and_unload().state_dict()
    assert merged.keys() == wanted.infos.keys()
    for name in merged:
        np.testing.assert_allclose(merged[name].numpy(), wanted.read(name).data, rtol=1e-5, atol=1e-5, err_msg=name)


def test_peft_merges_an_adapter_of_a_slime(tmp_path):
    """Its adapters train whole: modules inside of modules, tensors of their own beside them, and constants."""
    infos = slime_infos(from_hf_config(CONFIG, vision_config=TOWER))
    rng = np.random.default_rng(2)
    base = {name: rng.standard_normal(info.shape).astype(np.float32) for name, info in infos.items()}
    adapted = [f"language_model.layers.0.self_attn.{part}_proj" for part in "qo"]
    constant = ("pos_embed", "w_noise")
    whole = [n for n in base if n.startswith(("mm_projector.", "sampler.")) and not n.endswith(constant)]
    trained = {name: base[name] + 1 for name in whole}
    for name in adapted:
        trained |= {f"{name}.lora_A": np.ones((2, 32), np.float32), f"{name}.lora_B": np.ones((32, 2), np.float32)}
    files = AdapterFiles(MODELS["slime"], infos, adapted, whole, rank=2, alpha=4.0, dropout=0.0)
    assert files.modules == ("model.mm_projector", "model.sampler.post_qformer")
    files.write(tmp_path, {name: RawTensor.from_array((base | trained)[name]) for name in files.needed})
    wanted = base | {name: trained[name] for name in whole} | {f"{n}.weight": base[f"{n}.weight"] + 4 for n in adapted}
    before, after = (make_plan(SLIME.reverse(), infos).view(MemorySource(one)) for one in (base, wanted))
    merged = peft.PeftModel.from_pretrained(torch_module(before), str(tmp_path)).merge_and_unload().state_dict()
    assert merged.keys() == after.infos.keys()
    for name in merged:
        np.testing.assert_allclose(merged[name].numpy(), after.read(name).data, rtol=1e-5, atol=1e-5, err_msg=name)
