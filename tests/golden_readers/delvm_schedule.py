"""Cases of DeLVM's schedules: learning rates, second betas and loss scales."""

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindvlm.parallel.zero import scheduled_beta2
from mindvlm.training.loss import LossScale, LossScaleConfig
from mindvlm.training.schedule import ScheduleConfig
from tests.golden_readers.case import Case
from tests.golden_readers.report import Report


def is_schedules(case: Case) -> bool:
    return "lr_schedules" in case.config and "loss_scalers" in case.config


def read_schedules(case: Case, report: Report) -> None:
    for name, values in case.config["lr_schedules"].items():
        compare_rates(report, f"lr.{name}", values)
    for name, values in case.config["beta2_schedules"].items():
        start, power = Tensor(values["init_beta2"], ms.float32), float(values["c"])
        counts = [Tensor(float(count), ms.float32) for count in range(values["record_steps"])]
        found = [float(scheduled_beta2(start, power, count)) for count in counts]
        report.close(f"beta2.{name}", np.array(found), bound=1e-6)
    for name, values in case.config["loss_scalers"].items():
        compare_scales(report, f"scale.{name}", values)


def compare_rates(report: Report, name: str, values: dict) -> None:
    """Compares the rates up to the last step; later values only show what torch's scheduler does."""
    total = values["total_steps"]
    schedule = ScheduleConfig(
        total_steps=total,
        idle_steps=values["init_steps"],
        warmup_steps=int(total * values["warmup_ratio"]),
        final_ratio=values["eta_min"] / values["lr"],
    )
    steps = np.arange(len(report.recorded[name]))
    found = np.array([values["lr"] * schedule.factor(int(step)) for step in steps])
    report.close(name, found, bound=1e-9, at=steps <= total, note="up to the last step")


def compare_scales(report: Report, name: str, values: dict) -> None:
    scale = LossScale(
        LossScaleConfig(
            initial=values["initial_scale"],
            growth_interval=values["growth_interval"],
            hysteresis=values["hysteresis"],
            minimum=float(values["min_scale"]),
            maximum=float(values["max_scale"]),
        )
    )
    found = [float(scale.value)]
    for overflows in values["overflow"]:
        scale(Tensor(not overflows))
        found.append(float(scale.value))
    report.close(name, np.array(found), bound=0.0)
