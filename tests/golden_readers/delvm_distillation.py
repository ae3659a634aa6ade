"""Cases of DeLVM's distillation: the loss and the metric on given logits."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindvlm.models.delvm.distillation import DistillationConfig, DistillationLoss
from mindvlm.nn.linear import Head
from mindvlm.processing.samples.token_metrics import sum_tokens, token_figures
from tests.golden_readers.case import Case
from tests.golden_readers.report import Report


def is_given_logits(case: Case) -> bool:
    return {"student_logits", "teacher_logits"} <= case.inputs.keys() and "variants" in case.config


def read_given_logits(case: Case, report: Report, mode: str) -> None:
    """Compares both terms and the gradient of each variant. The logits are states of a head with unit weights."""
    inputs, vocab_size = case.inputs, case.inputs["student_logits"].shape[1]
    heads = [Head(vocab_size, vocab_size) for _ in range(2)]
    for number, head in enumerate(heads):
        head.update_parameters_name(f"{number}.")
        head.weight.set_data(Tensor(np.eye(vocab_size, dtype=np.float32)))
    student, teacher, labels = (Tensor(inputs[name]) for name in ("student_logits", "teacher_logits", "labels"))
    for name, variant in case.config["variants"].items():
        loss = DistillationLoss(DistillationConfig(teacher="", **variant["kd_config"]), *heads)
        gradient = ms.value_and_grad(PassLoss(loss, variant["scale_loss"]), 0, has_aux=True)
        (total, terms), found = gradient(student, teacher, labels)
        report.close(f"{name}.total", total.asnumpy())
        report.close(f"{name}.loss_gt", terms.asnumpy()[0])
        report.close(f"{name}.loss_kd", terms.asnumpy()[1])
        report.close(f"{name}.grad_student_logits", found.asnumpy())
    compare_metric(case, report)


def compare_metric(case: Case, report: Report) -> None:
    """Compares accuracy, perplexity and loss of the student, then accuracies and losses of the types of data."""
    logits, labels, types = (case.inputs[name] for name in ("student_logits", "labels", "type_ids"))
    whole = token_figures([sum_tokens(logits, labels)])
    sums = [sum_tokens(logits[types == kind], labels[types == kind]) for kind in np.unique(types)]
    values = [whole[key] for key in ("accuracy", "perplexity", "loss")]
    values += [token_figures([one])[key] for key in ("accuracy", "loss") for one in sums]
    recorded = report.recorded["metric"]
    # the original rounds to four decimals
    difference = np.abs(np.array(values) - recorded) - 1e-6 * np.abs(recorded)
    report.check("metric", float(difference.max()), bound=5.1e-5, note="absolute, recorded with four decimals")
    report.close("metric_tokens", np.array([one.tokens for one in sums], np.int32))


class PassLoss(nn.Cell):
    """The loss of one of several passes that weigh the same, and its terms."""

    def __init__(self, loss: DistillationLoss, num_passes: int):
        super().__init__(auto_prefix=False)
        self.loss, self.num_passes = loss, num_passes

    def construct(self, student, teacher, labels):
        terms, num_labels = self.loss(student, teacher, labels, ops.ones_like(labels).astype(ms.float32))
        terms = terms / (num_labels * self.num_passes)
        return terms.sum(), terms
