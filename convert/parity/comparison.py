"""Proof that a converted model computes what its source computes: `compare_logits`.

The torch reference reads the source, the MindSpore model reads the target as `predict` would; both get the same seeded
inputs, each in a process of its own and one after the other, so that only one of them holds the weights. What every
stage gives is compared, which catches what no comparison of tensors can: a rule that is wrong in both directions, a
model that uses a tensor in the wrong place. A key bias of an attention without rotary positions is out of its reach: it
moves all scores of a query alike, so no output depends on it.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import open_checkpoint
from mindvlm.convert.parity.process import run_child
from mindvlm.convert.parity.stages import Side, Stage, StageResult, Token, compare_stage, compare_tokens
from mindvlm.core.errors import UserError
from mindvlm.weights.rules.findings import format_table

BOUND = 1e-5
GREEDY_IDS, STEP_LOGITS = "greedy_ids", "step_logits"


@dataclass(frozen=True, kw_only=True)
class ParityRequest:
    """What to compare; nothing but JSON types, it goes to the processes as a file.

    Attributes:
        model: a key of `MODELS`.
        source_paths, merge_lora, only: as for `open_native`.
        dtype: "keep", or the dtype that the conversion rounded to; the reference rounds its weights in the same way.
        target: the file or folder written.
        config: the model's config.json.
        seed: of pixels and prompt.
        num_tokens: greedy tokens to decode.
    """

    model: str
    source_paths: list[str]
    target: str
    config: dict[str, Any]
    merge_lora: str | None = None
    only: str | None = None
    dtype: str = "keep"
    seed: int = 0
    num_tokens: int = 32


@dataclass(frozen=True)
class ParityModel:
    """How a model is run on either side.

    Attributes:
        stages: by key, in order of computation.
        reference: "module:function" of the torch side, called with (request, say) -> stages by key.
        mindspore: "module:function" of our side, called with (request, forced_ids, say) -> stages by key. It decodes
            along `forced_ids`, the reference's choice, and returns its own choice at each step.
    """

    stages: dict[str, Stage]
    reference: str
    mindspore: str


_VOCABULARY = {
    "vocabulary_neck": Stage("vocabulary neck", "vision_vocabulary.* up to the neck"),
    "vocabulary_features": Stage("vocabulary features", "vision_vocabulary.net_2.*, net_3.*"),
}
_STEPS = Stage("logits with cache", "those of the decoder, used with its cache")
_TINYLLAVA = ParityModel(
    {
        "tower_features": Stage("vision features", "vision_tower.*"),
        "tower_last_hidden": Stage("vision last layer", "vision_tower.encoder.layers.* behind the features"),
        "tower_pooled": Stage("vision last norm", "vision_tower.post_layernorm.*"),
        "connector": Stage("connector", "mm_projector.*"),
        "merged_embeddings": Stage("merged embeddings", "language_model.embed_tokens.*"),
        "layers": Stage("decoder layers", "language_model.layers.*, norm.*", stacked=True),
        "logits": Stage("logits", "language_model.lm_head.*"),
        STEP_LOGITS: _STEPS,
    },
    "mindvlm.convert.reference.tinyllava_stages:run",
    "mindvlm.convert.parity.tinyllava:run",
)
MODELS: dict[str, ParityModel] = {
    "vary_toy": ParityModel(
        {
            "clip_features": Stage("CLIP features", "vision_tower.*"),
            "clip_last_hidden": Stage("CLIP last layer", "vision_tower.encoder.layers.* behind the features"),
            "clip_pooled": Stage("CLIP pooled", "vision_tower.post_layernorm.*"),
            **_VOCABULARY,
            "connector": Stage("connector", "mm_projector.*, mm_projector_vary.*"),
            "merged_embeddings": Stage("merged embeddings", "language_model.embed_tokens.*"),
            "layers": Stage("decoder layers", "language_model.layers.*, norm.*", stacked=True),
            "logits": Stage("logits", "language_model.lm_head.*"),
            STEP_LOGITS: _STEPS,
        },
        "mindvlm.convert.reference.vary_stages:run",
        "mindvlm.convert.parity.vary:run",
    ),
    "vary_tiny": ParityModel(
        {
            **_VOCABULARY,
            "connector": Stage("connector", "mm_projector.*"),
            "merged_embeddings": Stage("merged embeddings", "language_model.embed_tokens.*"),
            "layers": Stage("decoder layers", "language_model.embed_positions.*, layers.*, norm.*", stacked=True),
            "logits": Stage("logits", "language_model.embed_tokens.* as the head"),
            STEP_LOGITS: _STEPS,
        },
        "mindvlm.convert.reference.vary_stages:run",
        "mindvlm.convert.parity.vary:run",
    ),
    **dict.fromkeys(("tinyllava_phi", "tinyllava_stablelm", "tinyllava_llama"), _TINYLLAVA),
}


@dataclass(frozen=True)
class ParityReport:
    """What was found.

    Attributes:
        stages: in order of computation; those that the tensors do not allow are left out.
        tokens: one per greedy step; none without a language model.
        bound: the relative error that is allowed.
        reference, mindspore: how long each side took and what it needed.
    """

    stages: tuple[StageResult, ...]
    tokens: tuple[Token, ...]
    bound: float
    reference: Side
    mindspore: Side

    @property
    def passed(self) -> bool:
        """Whether every stage is within the bound and every id is the same, or one of several that are equally good."""
        return not self.failed_stages and all(token.equal or token.tie for token in self.tokens)

    @property
    def failed_stages(self) -> tuple[StageResult, ...]:
        return tuple(stage for stage in self.stages if not stage.passed)

    @property
    def num_equal(self) -> int:
        return sum(token.equal for token in self.tokens)

    def failure(self) -> str | None:
        """What went wrong first, in one line; None if nothing did."""
        if self.passed:
            return None
        if not self.failed_stages:
            return self._tokens_line()
        first = self.failed_stages[0]
        return (
            f"stage {first.title} is wrong, those before it are not ({first.finding(self.bound)}); "
            f"the tensors that enter there are {first.tensors}"
        )

    def table(self) -> str:
        """Every stage with its shape, errors and verdict, then the greedy ids and what each side took."""
        rows = [("stage", "shape", "relative error", "max difference", "")]
        for stage in self.stages:
            rows.append(
                (
                    stage.title,
                    " x ".join(map(str, stage.shape)),
                    f"{stage.relative_error:.1e}",
                    f"{stage.max_difference:.1e}",
                    "ok" if stage.passed else f"FAILED {stage.note}".rstrip(),
                )
            )
        lines = format_table(rows)
        if self.tokens:
            lines.append(self._tokens_line())
        lines += [side.describe() for side in (self.reference, self.mindspore)]
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """The same for a JSON report."""
        return {
            "passed": self.passed,
            "bound": self.bound,
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "greedy_ids": {
                "compared": len(self.tokens),
                "equal": self.num_equal,
                "different": [dataclasses.asdict(token) | {"step": step} for step, token in self._different()],
            },
            "reference": dataclasses.asdict(self.reference),
            "mindspore": dataclasses.asdict(self.mindspore),
        }

    def _different(self) -> list[tuple[int, Token]]:
        return [(step, token) for step, token in enumerate(self.tokens) if not token.equal]

    def _tokens_line(self) -> str:
        line = f"greedy ids: {self.num_equal} of {len(self.tokens)} equal"
        for step, token in self._different():
            verdict = "a tie" if token.tie else "FAILED"
            line += (
                f"; step {step}: {token.actual} instead of {token.expected}, whose logit is {token.gap:.1e} larger "
                f"({verdict}, the logits differ by up to {token.max_difference:.1e})"
            )
        return line


def compare_logits(
    request: ParityRequest, *, bound: float = BOUND, progress: Callable[[str], None] | None = None
) -> ParityReport:
    """Run source and target on the same inputs and compare every stage; see the module.

    Memory: each process needs the float32 weights of the model and up to a third more; this one needs a few MB.

    Args:
        bound: the largest relative Frobenius error of a stage that passes.
        progress: called with one line before each step.

    Raises:
        UserError: an unknown model, torch is not installed, a source or the target cannot be read, or a process failed
            or ran out of memory. A difference is no error: see `ParityReport.passed` and `failure`.
    """
    if request.model not in MODELS:
        raise UserError(f"--verify logits is not defined for {request.model!r}; expected one of: {', '.join(MODELS)}")
    with tempfile.TemporaryDirectory(prefix="mindvlm-parity-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(dataclasses.asdict(request)), encoding="utf-8")
        for side in ("reference", "mindspore"):
            run_child(side, folder, progress)
        return read_report(folder, MODELS[request.model], bound)


def read_report(folder: Path, model: ParityModel, bound: float) -> ParityReport:
    """Compare what the two processes have left in `folder`.

    Raises:
        UserError: neither side has a stage in common, so nothing would be proved.
    """
    with (
        open_checkpoint(folder / "reference.safetensors") as expected,
        open_checkpoint(folder / "mindspore.safetensors") as actual,
    ):
        stages = tuple(
            compare_stage(key, stage, expected, actual, bound)
            for key, stage in model.stages.items()
            if key in expected.infos or key in actual.infos
        )
        if not stages:
            raise UserError("--verify logits has nothing to compare: the tensors make up no stage of the model")
        tokens = compare_tokens(expected, actual, GREEDY_IDS, STEP_LOGITS, bound)
        return ParityReport(stages, tokens, bound, Side.of(expected), Side.of(actual))
