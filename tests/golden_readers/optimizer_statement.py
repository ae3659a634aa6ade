"""Strict parser of the README sentence that states an optimizer step; a clause it cannot parse is an error."""

import re
from dataclasses import dataclass, field

from tests.golden_readers.readme_rules import NUMBER

COUNTS = {"one": 1, "a": 1, "an": 1, "single": 1, "two": 2, "three": 3, "four": 4, "five": 5}
# up to the next blank line, list item, heading or table row
STATEMENT = re.compile(
    r"\b(\w+) (Adam\w*|SGD|Lion|Adafactor)(?: optimi[sz]er)? steps?\b(.*?)(?=\n\s*\n|\n\s*[-*#|]|\Z)", re.DOTALL
)
SETTINGS = {
    "learning_rate": rf"(?:lr|learning[ _]rate)\s*[=:]?\s*({NUMBER})",
    "betas": rf"betas?\s*[=:]?\s*[(\[]\s*({NUMBER}\s*,\s*{NUMBER})\s*[)\]]",
    "eps": rf"eps(?:ilon)?\s*[=:]?\s*({NUMBER})",
    "weight_decay": rf"weight[ _]decay\s*[=:]?\s*({NUMBER})",
}
MAX_NORM = re.compile(
    rf"(?:(?:with )?(?:gradients? |grad(?:ient)?[ _])?(?:norm )?clip(?:ped|ping|s)?\b[ _a-z]*?[=:]?\s*"
    rf"|max[_ ](?:grad(?:ient)?[_ ])?norm\s*[=:]?\s*)({NUMBER})"
)
WITHOUT_EFFECT = (
    r"decoupled (?:weight )?decay(?: \(.*\))?",
    r"no amsgrad|amsgrad (?:off|false)|without amsgrad",
    r"no (?:schedule|warm-?up)|constant (?:lr|learning rate)|on the same batch",
)
NO_CLIPPING = r"(?:no|without) (?:gradient |grad )?(?:norm )?clipping|(?:gradient )?clipping (?:off|none)"
BIAS_CORRECTION = r"(?:with )?bias[- _]correction(?: (?:on|true))?"
NO_BIAS_CORRECTION = r"(?:no|without) bias[- _]correction|bias[- _]correction (?:off|false)"
ABOUT_THE_STEP = re.compile(
    r"\b(?:lr|learning rate|betas?|eps|decays?|clip\w*|bias correction|warm|schedule|momentum|amsgrad)\b"
)


@dataclass
class OptimizerStatement:
    """AdamW settings stated in a README.

    Attributes:
        max_grad_norm: infinity without clipping.
        exempt_names: parameters whose name contains one of these do not decay.
        exempt_classes: parameters of these classes, named as in torch ('LayerNorm'), do not decay.
    """

    num_steps: int = 1
    learning_rate: float = 0.0
    betas: list[float] = field(default_factory=list)
    eps: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = float("inf")
    bias_correction: bool = True
    exempt_names: list[str] = field(default_factory=list)
    exempt_classes: list[str] = field(default_factory=list)


def read_statement(*readmes: str) -> OptimizerStatement:
    """Reads the statement of the first README that has one.

    Raises:
        ValueError: no README has a statement, or a part cannot be parsed; the message quotes it.
    """
    for readme in readmes:
        for count, optimizer, text in STATEMENT.findall(readme):
            if ABOUT_THE_STEP.search(text.lower()):
                return parse_statement(count, optimizer, " ".join(text.split()))
    raise ValueError("no sentence of the form 'ONE AdamW step: lr ...' in the README")


def parse_statement(count: str, optimizer: str, text: str) -> OptimizerStatement:
    if optimizer != "AdamW":
        raise ValueError(f"optimizer {optimizer} is not AdamW")
    statement = OptimizerStatement(num_steps=parse_count(count))
    first, *others = [sentence.strip(" :*") for sentence in re.split(r"\.\s+|\.$", text.strip()) if sentence.strip()]
    stated = {name for clause in split_clauses(first.lstrip(" :")) for name in [read_clause(statement, clause)]}
    missing = [name for name in SETTINGS if name not in stated]
    if missing:
        raise ValueError(f"the optimizer statement does not give {', '.join(missing)}")
    for sentence in others:
        if not read_groups(statement, sentence) and ABOUT_THE_STEP.search(sentence.lower()):
            raise ValueError(f"the optimizer statement is not understood: {sentence!r}")
    return statement


def parse_count(word: str) -> int:
    if word.lower() in COUNTS:
        return COUNTS[word.lower()]
    if word.isdigit() and int(word) > 0:
        return int(word)
    raise ValueError(f"the number of optimizer steps is not understood: {word!r}")


def split_clauses(text: str) -> list[str]:
    """Splits the text at commas and semicolons outside brackets."""
    clauses, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if character in ",;" and depth == 0:
            clauses.append(text[start:position])
            start = position + 1
    return [clause.strip().removeprefix("and ").strip() for clause in [*clauses, text[start:]] if clause.strip()]


def read_clause(statement: OptimizerStatement, clause: str) -> str:
    """Applies one clause and returns the name of its setting."""
    low = clause.lower().strip()
    for name, pattern in SETTINGS.items():
        if found := re.fullmatch(pattern, low):
            numbers = [float(number) for number in found.group(1).split(",")]
            setattr(statement, name, numbers if name == "betas" else numbers[0])
            return name
    if re.fullmatch("no weight decay", low):
        statement.weight_decay = 0.0
        return "weight_decay"
    if re.fullmatch(NO_CLIPPING, low):
        statement.max_grad_norm = float("inf")
        return "max_grad_norm"
    if re.fullmatch(NO_BIAS_CORRECTION, low) or re.fullmatch(BIAS_CORRECTION, low):
        statement.bias_correction = re.fullmatch(NO_BIAS_CORRECTION, low) is None
        return "bias_correction"
    if (found := MAX_NORM.fullmatch(low)) and "value" not in low:
        statement.max_grad_norm = float(found.group(1))
        return "max_grad_norm"
    if any(re.fullmatch(pattern, low) for pattern in WITHOUT_EFFECT):
        return low
    if read_groups(statement, clause):
        return "groups"
    raise ValueError(f"the optimizer statement is not understood: {clause!r}")


def read_groups(statement: OptimizerStatement, sentence: str) -> bool:
    """Applies a sentence about parameters that do not decay; returns False if the sentence is about something else.

    Raises:
        ValueError: an exception in the sentence cannot be parsed.
    """
    found = re.search(r"\bno (?:weight )?decay (?:for|on) (.*?)(?:;|$)", sentence)
    if not found:
        return bool(re.search(r"\b(?:everything|all parameters|every parameter) (?:else )?decays?\b", sentence))
    for exempt in re.split(r",\s*(?:and\s+)?(?:for\s+|on\s+)?|\s+and\s+(?:for\s+|on\s+)?", found.group(1)):
        if name := re.fullmatch(r"(?:parameters with )?names (?:containing|with) [`'\"]?([\w.]+)[`'\"]?", exempt):
            statement.exempt_names.append(name.group(1))
        elif re.fullmatch(r"(?:the )?bias(?:es)?", exempt):
            statement.exempt_names.append("bias")
        elif cls := re.fullmatch(r"(?:the )?(?:parameters|weights) of (?:torch\.)?(?:nn\.)?(\w+)", exempt):
            statement.exempt_classes.append(cls.group(1))
        else:
            raise ValueError(f"the optimizer's parameter groups are not understood: {exempt!r}")
    return True
