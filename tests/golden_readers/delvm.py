"""Cases of DeLVM's decoder in both forms."""

import re
from collections.abc import Mapping
from itertools import pairwise

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindvlm.checkpoint import MemorySource
from mindvlm.core.config import GenerationConfig
from mindvlm.generation.request import Request
from mindvlm.models.delvm.checkpoint_config import VQGAN_CLASS, from_published, is_delvm, is_vit
from mindvlm.models.delvm.names import MODELS
from mindvlm.nn.parameters import name_by_place
from mindvlm.processing.samples.token_metrics import sum_tokens, token_figures
from mindvlm.training.optimizer import OptimizerConfig
from mindvlm.training.step import TrainStep
from mindvlm.weights.rules.planning import make_plan
from tests.golden_readers import kernels
from tests.golden_readers.case import Case
from tests.golden_readers.delvm_loaded import load_model
from tests.golden_readers.language import DecoderStates
from tests.golden_readers.loaded import RecordingEngine
from tests.golden_readers.report import TRAINING_BOUND, Report

STATEMENT = re.compile(
    r"AdamW step on all parameters: lr (\S+), betas \((\S+?), ?(\S+?)\), eps (\S+), weight decay (\S+) everywhere"
)
SHARE = 0.97
"""Part of a tensor that must lie within a hundredth of the learning rate after a step."""


def is_decoder(case: Case) -> bool:
    return (
        case.weights.exists()
        and bool(case.inputs)
        and is_delvm(case.config)
        and case.config.get("_class_name") != VQGAN_CLASS
    )


class DecoderReader:
    """Runs the decoder of a case in either form."""

    def __init__(self, case: Case, report: Report, mode: str):
        self.case, self.report, self.graph_mode = case, report, mode == "graph"
        self.config = from_published(case.config)
        self.model = load_model(case.folder, self.config)
        self.engine = self.new_engine(1)
        self.states = DecoderStates(self.model.language_model)

    def new_engine(self, num_slots: int) -> RecordingEngine:
        length = max([self.config.max_length, *(array.shape[-1] for array in self.case.inputs.values())])
        return RecordingEngine(
            self.model, placeholder_id=-1, max_length=length, graph_mode=self.graph_mode, num_slots=num_slots
        )

    def run(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the states of all layers (the last one after the final norm) and the logits of ids (B, L)."""
        embeds = self.engine.merged_embeddings(ids.astype(np.int32))
        states, normed, logits = self.engine.runner.run("prefill", self.states, embeds, self.engine.frequencies(1))
        return np.stack([state.asnumpy() for state in (*states, normed)]), logits.asnumpy()

    def compare_hf(self) -> None:
        inputs, report = self.case.inputs, self.report
        states, logits = self.run(inputs["input_ids"])
        report.close("hidden_states", np.concatenate((states[:-2], states[-1:])))
        report.close("logits", logits)
        self.compare_loss("loss", logits[:, :-1], inputs["labels"][:, 1:])
        self.compare_cache(inputs["input_ids"][:1])
        report.skip("attn_layer0", "the attention returns no probabilities")
        self.compare_generation("gen_", [inputs["gen_input_ids"][0].tolist()])
        mask = inputs["pad_attention_mask"] == 1
        padded = np.zeros((*mask.shape, logits.shape[-1]), np.float32)
        rows = [ids[real].tolist() for ids, real in zip(inputs["pad_input_ids"], mask, strict=True)]
        for row, ids in enumerate(rows):
            # rows are not padded here: the engine runs each of them at its own length
            padded[row, mask[row]] = self.run(np.array([ids]))[1][0]
        report.close("pad_logits", padded, at=mask, note="real codes")
        self.compare_generation("pad_gen_", rows)
        following = np.pad(inputs["labels"][:, 1:], ((0, 0), (0, 1)), constant_values=-100)
        if kernels.in_use == "off":
            self.compare_gradients(inputs["input_ids"], following)
            self.compare_step(inputs["input_ids"], following)

    def compare_loss(self, name: str, logits: np.ndarray, labels: np.ndarray) -> None:
        """Compares the mean next-code loss of logits (..., V), by the loss that trains."""
        head = self.model.language_model.lm_head
        width = logits.shape[-1]
        identity = Tensor(np.eye(width, dtype=np.float32))
        states = np.concatenate((logits.reshape(1, -1, width), np.zeros((1, 1, width), np.float32)), 1)
        targets = np.concatenate(([-100], labels.reshape(-1)))[None].astype(np.int32)
        total, count = head.token_loss(Tensor(states), identity, Tensor(targets))
        self.report.close(name, np.float32(total.asnumpy() / count.asnumpy()))

    def compare_cache(self, ids: np.ndarray) -> None:
        slot = self.engine.add(Request(ids=ids[0].tolist()))
        for place, layer in (("layer0", 0), ("last", -1)):
            cache = self.engine.caches[layer % len(self.engine.caches)]
            for kind in ("key", "value"):
                stored = getattr(cache, kind).asnumpy()[:, :, : ids.shape[1]]
                self.report.close(f"past_{kind}_{place}", stored)
        self.engine.release(slot)

    def compare_generation(self, prefix: str, rows: list[list[int]]) -> None:
        """Compares greedy codes of all rows at once, their logits, and the gap between the two largest."""
        steps = self.report.recorded[f"{prefix}ids"].shape[1]
        engine = self.new_engine(len(rows))
        engine.resize(len(rows))
        slots = engine.complete([Request(ids=ids, options=GenerationConfig(max_new_tokens=steps)) for ids in rows])
        self.report.close(f"{prefix}ids", np.array([slot.new_ids for slot in slots], np.int32))
        logits = np.stack(engine.recorded, 1)
        self.report.close(f"{prefix}logits", logits)
        top = np.sort(logits, -1)
        self.report.close(f"{prefix}margin", top[..., -1] - top[..., -2], bound=1e-4, note="a difference of logits")

    def compare_packs(self) -> None:
        """Compares packs, whose segments do not see each other, segment by segment."""
        inputs, report = self.case.inputs, self.report
        for pack, ids in enumerate(inputs["input_ids"]):
            ends = inputs[f"cu_seqlens_{pack}"].tolist()
            parts = [self.run(ids[None, start:end]) for start, end in pairwise(ends)]
            name = f"pack{pack}."
            states = np.concatenate([states for states, _ in parts], 2)[:, 0]
            logits = np.concatenate([logits for _, logits in parts], 1)[0]
            report.close(f"{name}hidden_states", states)
            report.close(f"{name}logits", logits)
            self.compare_attention(f"{name}attn_out_block0", ids, ends)
            labels = inputs["labels"][pack]
            self.compare_loss(f"{name}loss", logits, labels)
            self.compare_metrics(name, logits, labels)
        _, logits = self.run(inputs["eval_input_ids"])
        report.close("eval.logits", logits)
        self.compare_loss("eval.loss", logits, inputs["eval_labels"])
        report.skip("half.pack0.logits", "the README calls it no reference")
        if kernels.in_use == "off":
            self.compare_gradients(inputs["input_ids"][:1], inputs["labels"][:1], *segments(inputs, 0))

    def compare_gradients(self, *arrays: np.ndarray) -> None:
        """Compares the gradients of the mean loss of ids, next ids and optional positions and segments, each (B, L)."""
        model, report = self.model, self.report
        name_by_place(model)
        parameters = [parameter for parameter in model.get_parameters() if parameter.requires_grad]
        ids, labels, *rest = (Tensor(array.astype(np.int32)) for array in arrays)
        gradient = ms.value_and_grad(model, None, ms.ParameterTuple(parameters), has_aux=True)
        (_, number), found = gradient(ids, labels, self.engine.frequencies(1), *rest)
        pairs = zip(parameters, found, strict=True)
        mean = MemorySource({parameter.name: (one / number).asnumpy() for parameter, one in pairs})
        names = MODELS[is_vit(self.case.config)]
        table = names.forms["internlm"].table if self.config.input_embedding == "codebook" else names.hf
        view = make_plan(table.reverse(), mean.infos, partial=True).view(mean)
        norm = np.sqrt(sum((mean.read(name).data.astype(np.float64) ** 2).sum() for name in mean.infos))
        report.close("grad_norm_all", np.float32(norm), bound=TRAINING_BOUND)
        for name in view.infos:
            if f"grad.{name}" in report.recorded:
                report.close(f"grad.{name}", view.read(name).data, bound=TRAINING_BOUND)

    def compare_attention(self, name: str, ids: np.ndarray, ends: list[int]) -> None:
        parts = []
        for start, end in pairwise(ends):
            embeds = self.engine.merged_embeddings(ids[None, start:end].astype(np.int32))
            parts.append(FirstAttention(self.model.language_model)(embeds, self.engine.frequencies(1)).asnumpy()[0])
        self.report.close(name, np.concatenate(parts))

    def compare_metrics(self, name: str, logits: np.ndarray, labels: np.ndarray) -> None:
        """Compares the accuracy, the loss and the perplexity, which are recorded with four decimals."""
        sums = sum_tokens(logits, labels)
        figures = token_figures([sums])
        for recorded_as, key in (("acc", "accuracy"), ("loss", "loss"), ("perplexity", "perplexity")):
            recorded = float(self.report.recorded[f"{name}metric_{recorded_as}"])
            error = abs(figures[key] - recorded) / max(1.0, recorded)
            self.report.check(f"{name}metric_{recorded_as}", error, bound=1e-4)
        self.report.close(f"{name}metric_tokens", np.int32(sums.tokens))

    def compare_step(self, ids: np.ndarray, labels: np.ndarray) -> None:
        """Compares the weights after the step that the README states, and the loss then; changes the model."""
        if not (stated := STATEMENT.search(self.case.readme)):
            return
        rate, beta1, beta2, eps, decay = map(float, stated.groups())
        config = OptimizerConfig(
            learning_rate=rate, betas=[beta1, beta2], eps=eps, weight_decay=decay, no_decay=[], max_grad_norm=None
        )
        step = TrainStep(self.model.set_train(), config)
        batch = (Tensor(ids.astype(np.int32)), Tensor(labels.astype(np.int32)), self.engine.frequencies(1))
        step(Tensor(rate, ms.float32), *batch)
        source = MemorySource({one.name: one.asnumpy() for one in self.model.trainable_params()})
        view = make_plan(MODELS[is_vit(self.case.config)].hf.reverse(), source.infos, partial=True).view(source)
        for name in view.infos:
            if (recorded := self.report.recorded.get(f"after.{name}")) is not None:
                compare_updated(self.report, f"after.{name}", view.read(name).data, recorded, rate)
        total, number = self.model(*batch)
        self.report.close("loss_after_step", (total / number).asnumpy(), bound=TRAINING_BOUND)


def compare_updated(
    report: Report, name: str, array: np.ndarray, recorded: np.ndarray, rate: float, *, num_steps: int = 1
) -> None:
    """Compares weights after some steps by the learning rate; the first updates follow signs."""
    difference = np.abs(array.astype(np.float64) - recorded) / rate
    note = "share of the elements that are off by more than a hundredth of the rate"
    report.check(name, float((difference > 1e-2).mean()), bound=1 - SHARE, note=note)
    report.check(f"{name}, largest", float(difference.max()), bound=2.0 * num_steps)


def segments(inputs: Mapping[str, np.ndarray], pack: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions and the segment of each code of a recorded pack, (1, L) int32 each."""
    lengths = np.diff(inputs[f"cu_seqlens_{pack}"])
    return inputs["indexes"][pack][None], np.repeat(np.arange(len(lengths)), lengths)[None]


class FirstAttention(nn.Cell):
    """The output of the first layer's attention, after its output projection."""

    def __init__(self, language_model):
        super().__init__(auto_prefix=False)
        self.language_model = language_model

    def construct(self, embeds, inv_freq):
        layer = self.language_model.layers[0]
        positions = ops.arange(embeds.shape[1]).astype(ms.int32).reshape((1, -1))
        cos, sin, _, mask = self.language_model.shared_inputs(positions, inv_freq)
        query, key, value = layer.self_attn.project(layer.input_layernorm(embeds), cos, sin)
        return layer.self_attn.attend(query, key, value, mask)


def read_decoder_case(case: Case, report: Report, mode: str) -> None:
    if "cu_seqlens_0" in case.inputs and "step0.logits" not in case.outputs:
        DecoderReader(case, report, mode).compare_packs()
    elif "gen_input_ids" in case.inputs:
        DecoderReader(case, report, mode).compare_hf()
    else:
        report.skip_rest("training is not part of this family yet")
