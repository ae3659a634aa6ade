"""Every model and every naming is recognised, and converts back to the same bytes."""

from functools import partial

import pytest

from mindvlm.checkpoint import MemorySource
from mindvlm.core.errors import UserError
from mindvlm.weights.recognise import detect_model, native_view
from mindvlm.weights.rules.findings import ConversionError
from mindvlm.weights.rules.naming import best_fit
from mindvlm.weights.rules.operations import Drop, Rename
from mindvlm.weights.rules.planning import make_plan
from mindvlm.weights.rules.table import Part, RuleTable
from tests.known_models import ALL, MODELS, VARY
from tests.models.vary.vary_names import (
    SMALL,
    SMALL_TINY,
    clip_file_shapes,
    hf_shapes,
    infos,
    mindocr_name,
    random_tensors,
    sam_file_shapes,
    sam_shapes,
    tiny_shapes,
    transformers_sam_name,
    transformers_sam_shapes,
)


def only(shapes, *prefixes):
    return {name: shape for name, shape in shapes.items() if name.startswith(prefixes)}


def renamed(shapes, old, new):
    return {new + name.removeprefix(old): shape for name, shape in shapes.items()}


def mindocr_shapes():
    shapes = {}
    for name, shape in hf_shapes(SMALL).items():
        if "c_attn" in name:
            for part in "qkv":
                shapes[mindocr_name(name).replace("attn.c_attn", f"attention.w{part}")] = (shape[0] // 3, *shape[1:])
        else:
            shapes[mindocr_name(name)] = shape
    return shapes


def native_shapes(name, shapes):
    model = MODELS[name]
    return {info.name: info.shape for info in make_plan(model.hf, infos(shapes)).infos.values()}


TOY, TINY, OTHER_TINY = hf_shapes(SMALL), tiny_shapes(SMALL_TINY), tiny_shapes(SMALL_TINY, "vision_tower")
CLIP = only(clip_file_shapes(SMALL), "vision_model.")
DECODER = only(TINY, "model.decoder.")
PROJECTORS = renamed(only(TOY, "transformer.mm_projector"), "transformer.", "")
FILES = {
    "Vary-toy": ("vary_toy", "Hugging Face", TOY),
    "Vary-toy of MindOCR": ("vary_toy", "MindOCR", mindocr_shapes()),
    "Vary-toy, native": ("vary_toy", "native", native_shapes("vary_toy", TOY)),
    "Vary-tiny": ("vary_tiny", "Hugging Face", TINY),
    "Vary-tiny without lm_head": ("vary_tiny", "Hugging Face", {n: s for n, s in TINY.items() if n[:2] != "lm"}),
    "Vary-tiny of the other repository": (
        "vary_tiny", "Hugging Face with vision_tower", OTHER_TINY,
    ),
    "Vary-tiny, native": ("vary_tiny", "native", native_shapes("vary_tiny", TINY)),
    "language model of Vary-toy": (
        "vary_toy", "Hugging Face", only(TOY, "transformer.h", "transformer.wte", "transformer.ln_f", "lm_head"),
    ),
    "language model of Vary-tiny": ("vary_tiny", "Hugging Face", {**DECODER, "lm_head.weight": (20, 6)}),
    "OPT": ("vary_tiny", "OPT", renamed(DECODER, "model.", "")),
    "CLIP tower": ("vary_toy", "CLIP", CLIP),
    "CLIP": ("vary_toy", "CLIP", clip_file_shapes(SMALL)),
    "CLIP under vision_tower": ("vary_toy", "CLIP under vision_tower", renamed(CLIP, "", "vision_tower.")),
    "SAM": ("vary_toy", "SAM", sam_file_shapes(SMALL)),
    "SAM of transformers": ("vary_toy", "SAM of transformers", transformers_sam_shapes(SMALL)),
    "vocabulary of Vary-toy": ("vary_toy", "Hugging Face", only(TOY, "transformer.vision_tower_high.")),
    "vocabulary of Vary-tiny": ("vary_tiny", "Hugging Face", only(TINY, "model.vision_tower_2.")),
    "vocabulary of Vary-tiny of the other repository": (
        "vary_tiny", "Hugging Face with vision_tower", only(OTHER_TINY, "model.vision_tower."),
    ),
    "vocabulary, native": ("vary_toy", "native", sam_shapes(SMALL, "vision_vocabulary.")),
    "projectors": ("vary_toy", "Hugging Face", only(TOY, "transformer.mm_projector")),
    "projector of Vary-tiny": ("vary_tiny", "Hugging Face", only(TINY, "model.mm_projector.")),
    "projector of Vary-tiny, native": ("vary_tiny", "native", only(PROJECTORS, "mm_projector.")),
    "projectors under model": ("vary_toy", "projector file", renamed(PROJECTORS, "", "model.")),
    "projectors, native": ("vary_toy", "native", PROJECTORS),
}  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_it_is_recognised(file):
    name, naming, shapes = FILES[file]
    model = detect_model(ALL, infos(shapes), origin="file.bin")
    assert model is MODELS[name]
    assert model.detect_table(infos(shapes), "file.bin").name == naming


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_way_back_gives_the_same_bytes(file, dtype):
    """The names that the plan does not drop."""
    name, _, shapes = FILES[file]
    source = MemorySource(random_tensors(shapes, dtype))
    there = make_plan(MODELS[name].detect_table(source.infos), source.infos, partial=True).view(source)
    back = make_plan(there.plan.reverse_table(), there.infos, partial=True).view(there)
    kept = {name: info for name, info in source.infos.items() if name not in there.plan.dropped}
    assert back.infos == kept
    for name in kept:
        assert back.read(name).data.tobytes() == source.read(name).data.tobytes(), name
    assert len(kept) == len(shapes) or "position_ids" in str(there.plan.dropped) or "SAM" in str(there.plan.dropped)


@pytest.mark.parametrize("file", FILES)
def test_any_lost_tensor_is_named_without_a_config(file):
    name, _, shapes = FILES[file]
    table = MODELS[name].detect_table(infos(shapes))
    plan = make_plan(table, infos(shapes))
    for lost in shapes:
        rest = infos({other: shape for other, shape in shapes.items() if other != lost})
        if lost in plan.dropped or lost in plan.aliases:
            make_plan(table, rest, plan.infos)
            continue
        with pytest.raises(ConversionError) as caught:
            make_plan(table, rest, partial=True)
        assert [(finding.status, finding.name) for finding in caught.value.findings] == [("missing", lost)]


def test_names_of_parts_are_those_of_the_command_line():
    keys = {"language_model", "vision_tower", "vision_vocabulary", "projectors"}
    assert {part.key for part in MODELS["vary_toy"].native.parts} == keys
    assert {part.key for part in MODELS["vary_tiny"].native.parts} == keys - {"vision_tower"}
    for model in MODELS.values():
        native = {pattern for rule in model.native.rules for pattern in rule.targets}
        for table in model.tables:
            assert {part.key for part in table.parts} <= {*keys, "vqgan"}
            assert {target for rule in table.rules for target in rule.targets} <= native, table.name
            assert table.model == model.name and table.family == model.family
            assert bool(table.takes_only) == table.name.startswith("Vary-")
        assert model.hf in model.tables and set(model.hf_tables) < set(model.tables)


class TestVocabularyHandover:
    """From Vary-tiny, Vary-toy and SAM, the vision vocabulary comes under the same names."""

    def names(self, model, shapes):
        table = MODELS[model].detect_table(infos(shapes))
        return set(make_plan(table, infos(shapes), partial=True).infos), make_plan(table, infos(shapes), partial=True)

    @pytest.mark.parametrize("tower", ["vision_tower", "vision_tower_2"])
    def test_vary_tiny_gives_its_vocabulary_to_vary_toy_and_nothing_else(self, tower):
        names, plan = self.names("vary_toy", tiny_shapes(SMALL_TINY, tower))
        assert names == set(sam_shapes(SMALL, "vision_vocabulary."))
        assert set(plan.dropped.values()) == {"part of another model; only its vision vocabulary is used"}

    def test_vary_toy_gives_its_vocabulary_to_vary_tiny(self):
        names, plan = self.names("vary_tiny", hf_shapes(SMALL))
        assert names == set(sam_shapes(SMALL, "vision_vocabulary."))
        assert len(plan.dropped) == len(hf_shapes(SMALL)) - len(names)

    @pytest.mark.parametrize("shapes", [sam_file_shapes(SMALL), transformers_sam_shapes(SMALL)])
    @pytest.mark.parametrize("model", ["vary_toy", "vary_tiny"])
    def test_sam_lacks_the_convolutions_and_the_plan_says_so(self, model, shapes):
        names, plan = self.names(model, shapes)
        assert names == {n for n in sam_shapes(SMALL, "vision_vocabulary.") if ".net_" not in n}
        assert plan.absent_parts == ("vocabulary convolutions",)
        again = make_plan(MODELS[model].native, plan.infos, partial=True)
        assert again.is_identity and "vocabulary convolutions" in again.absent_parts

    def test_one_convolution_alone_is_not_enough(self):
        shapes = hf_shapes(SMALL)
        del shapes["transformer.vision_tower_high.net_3.weight"]
        with pytest.raises(ConversionError, match="missing transformer.vision_tower_high.net_3.weight"):
            make_plan(MODELS["vary_toy"].hf, infos(shapes), partial=True)

    def test_the_same_values_from_each(self):
        tower = random_tensors(sam_shapes(SMALL, ""))
        results = []
        for prefix in (
            "transformer.vision_tower_high.",
            "model.vision_tower.",
            "model.vision_tower_2.",
            "image_encoder.",
        ):
            tensors = {
                prefix + n: t for n, t in tower.items() if prefix != "image_encoder." or not n.startswith("net_")
            }
            view = native_view(MemorySource(tensors), VARY)
            results.append({name: view.read(name).data.tobytes() for name in view.infos})
        tensors = {transformers_sam_name(name): tensor for name, tensor in tensors.items()}
        view = native_view(MemorySource(tensors), VARY)
        results.append({name: view.read(name).data.tobytes() for name in view.infos})
        for result in results[1:]:
            assert all(results[0][name] == value for name, value in result.items())
        assert [len(result) for result in results] == [len(tower)] * 3 + [len(tower) - 2] * 2


class TestDetection:
    def test_an_unknown_model_is_told_with_a_reason_for_each_family(self):
        with pytest.raises(UserError) as caught:
            detect_model(
                ALL,
                infos({"model.layers.0.mlp.experts.weight": (2, 2), "lm_head.weight": (2, 2), "x": (1,)}),
                folder_config={"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
                origin="file.bin",
            )
        message = str(caught.value)
        assert message.startswith("file.bin: not a known model: vary_toy knows 1 of the 3 tensors")
        for part in (
            "vary_tiny knows 1 of the 3",
            "tinyllava_llama knows 1 of the 3",
            "config.json says MixtralForCausalLM / mixtral",
            "unknown tensor is model.",
        ):
            assert part in message
        assert "\n" not in message

    @pytest.mark.parametrize("shapes", [{}, {"logit_scale": ()}, {"text_projection.weight": (2, 2)}])
    def test_a_file_with_nothing_to_keep_is_of_no_model(self, shapes):
        with pytest.raises(UserError, match="not a known model"):
            detect_model(ALL, infos(shapes))

    def test_an_ambiguous_file_is_told_with_a_reason_for_each_candidate(self):
        shapes = {"lm_head.weight": (2, 2)}
        with pytest.raises(UserError, match=r"is ambiguous .*vary_toy: .*; vary_tiny: .*specify it with --model"):
            detect_model(ALL, infos(shapes))

    def test_what_is_kept_counts_more_than_what_is_dropped(self):
        dropping = RuleTable("dropping", "vary", (Part("a", (Rename("a", "a"), Drop("b.*", ""))),))
        keeping = RuleTable("keeping", "vary", (Part("b", (Rename("b.c", "c"), Rename("b.d", "d"))),))
        fit = best_fit((dropping, keeping), infos({"a": (1,), "b.c": (1,), "b.d": (1,)}))
        assert (fit.table, fit.num_kept, fit.num_known) == (keeping, 2, 2)

    def test_config_decides_between_equals(self):
        sam = infos(sam_file_shapes(SMALL))
        assert detect_model(ALL, sam).name == "vary_toy"
        assert detect_model(ALL, sam, folder_config={"model_type": "vary"}).name == "vary_tiny"
        assert detect_model(ALL, sam, folder_config={"architectures": ["varyOPTForCausalLM"]}).name == "vary_tiny"
        assert detect_model(ALL, sam, folder_config={"model_type": "mmgpt"}).name == "vary_toy"
        assert detect_model(ALL, sam, folder_config={"model_type": 3, "architectures": "vary"}).name == "vary_toy"

    def test_names_decide_against_a_config_of_another_model(self):
        assert detect_model(ALL, infos(TOY), folder_config={"model_type": "vary"}).name == "vary_toy"
        assert detect_model(ALL, infos(TINY), folder_config={"model_type": "mmgpt"}).name == "vary_tiny"

    def test_of_equals_the_first_that_it_is_complete_for(self):
        projector = only(TINY, "model.mm_projector.")
        assert detect_model(ALL, infos(projector)).name == "vary_tiny"
        assert detect_model(ALL, infos(projector), folder_config={"model_type": "mmgpt"}).name == "vary_toy"
        assert detect_model(ALL, infos({"model.mm_projector.weight": (2, 2)})).name == "vary_toy"

    @pytest.mark.parametrize("known", [MODELS["vary_toy"].detect_table, partial(detect_model, ALL)])
    def test_too_many_tensors_or_layers_are_refused_at_once(self, known):
        for names, message in (
            ((f"a{i}" for i in range(20_001)), "holds 20,001 tensors, a model has at most 20,000; give"),
            (
                (f"transformer.h.{i}.ln_1.weight" for i in range(1001)),
                "h.1000.ln_1.weight' is of a layer beyond the 1000",
            ),
            ((f"a.{'9' * 5000}" for _ in range(1)), "is of a layer beyond"),
        ):
            with pytest.raises(UserError, match=f"file.bin: .*{message}") as caught:
                known(infos({name: (0,) for name in names}), origin="file.bin")
            assert len(str(caught.value)) < 300

    def test_the_most_that_is_looked_at_takes_seconds(self):
        """One tensor of each of 1000 layers of every kind, of 8: the others are all missing."""
        shapes = {f"transformer.h.{i}.ln_1.weight": (0,) for i in range(1000)}
        with pytest.raises(ConversionError) as caught:
            make_plan(detect_model(ALL, infos(shapes)).detect_table(infos(shapes)), infos(shapes), partial=True)
        assert len(caught.value.findings) < 10_000 and len(caught.value.rows) < 20

    @pytest.mark.parametrize("name", ["a\nb", "x" * 1000])
    def test_what_a_config_calls_a_model_is_shown_short(self, name):
        with pytest.raises(UserError) as caught:
            detect_model(ALL, infos({"x": (1,)}), folder_config={"model_type": name, "architectures": [name] * 99})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600

    def test_a_name_given_decides(self):
        assert detect_model(ALL, infos(TOY), name="vary_tiny").name == "vary_tiny"
        with pytest.raises(UserError, match="--model 'vary_toi' is unknown; expected one of: vary_toy, vary_tiny"):
            detect_model(ALL, infos(TOY), name="vary_toi")

    def test_damaged_files_are_still_recognised(self):
        shapes = {name: shape for index, (name, shape) in enumerate(TINY.items()) if index % 3}
        assert detect_model(ALL, infos({**shapes, "stranger": (1,)})).name == "vary_tiny"

    @pytest.mark.parametrize(
        ("shapes", "extra", "status"),
        [
            (TOY, "language_model.norm.weight", "duplicate"),
            (TOY, "transformer.layers.0.attention.wq.weight", "duplicate"),
            (TOY, "model.mm_projector_vary.bias", "duplicate"),
            (TOY, "language_model.layers.9.mlp.up_proj.weight", "unexpected"),
            (TINY, "model.vision_tower.neck.0.weight", "duplicate"),
            (TINY, "language_model.embed_tokens.weight", "duplicate"),
        ],
    )
    def test_two_namings_in_one_file_are_told(self, shapes, extra, status):
        mixed = infos({**shapes, extra: (2, 2)})
        with pytest.raises(ConversionError) as caught:
            detect_model(ALL, mixed).detect_table(mixed, "file.bin")
        assert [(finding.status, finding.name) for finding in caught.value.findings] == [(status, extra)]
        assert str(caught.value).startswith("file.bin mixes Hugging Face names with others: 1 ")

    def test_another_model_than_the_one_given(self):
        with pytest.raises(UserError, match="not a Vary checkpoint of the model vary_tiny"):
            MODELS["vary_tiny"].detect_table(infos(CLIP), "file.bin")
