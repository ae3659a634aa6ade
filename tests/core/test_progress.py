"""Who receives progress lines."""

import logging

from mindvlm.core.progress import LOGGER, is_progress_shown, progress_to, silence_progress

module_logger = logging.getLogger("mindvlm.some.module")


def test_lines_reach_every_receiver_and_nobody_afterwards():
    outer, inner = [], []
    with progress_to(outer.append), progress_to(None):
        with progress_to(inner.append):
            module_logger.info("50 %s done")
        module_logger.info("compiled")
        assert is_progress_shown()
    module_logger.info("late")
    assert inner == ["50 %s done"] and outer == ["50 %s done", "compiled"]
    assert not is_progress_shown() and not LOGGER.handlers


def test_a_silenced_process_sends_nothing_until_the_receiver_is_gone():
    lines = []
    with progress_to(lines.append):
        silence_progress()
        module_logger.info("rank 1")
        assert not is_progress_shown()
    assert lines == [] and LOGGER.level == logging.NOTSET


def test_errors_bring_their_traceback():
    lines = []
    with progress_to(lines.append):
        try:
            raise KeyError("slot")
        except KeyError:
            module_logger.exception("the engine failed")
    assert lines[0].startswith("the engine failed\nTraceback") and "KeyError: 'slot'" in lines[0]
