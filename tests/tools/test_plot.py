import json
import sys

import numpy as np
import pytest
from PIL import Image

from mindvlm.tools.benchmarks.figure import COLORS as PEER_COLORS
from mindvlm.tools.plot import COLORS, draw, main, series


def write_run(folder, records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


def has_color(image, color):
    return bool((np.asarray(image.convert("RGB")) == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).any())


def test_several_runs_in_one_picture(tmp_path):
    first = write_run(tmp_path / "a", [{"step": s, "loss": 3 / s, "learning_rate": 1e-3} for s in range(1, 60)])
    second = write_run(tmp_path / "b", [{"step": 5, "loss": 2.0}, {"step": 9, "loss": float("nan"), "cer": 0.5}])
    output = tmp_path / "curve.png"
    assert main([first, second, "--output", str(output), "--smoothing", "0.6"]) == 0
    with Image.open(output) as image:
        assert image.size == (1000, 3 * 300), "loss, learning_rate and cer"
        assert has_color(image, COLORS[0]) and has_color(image, COLORS[1])
    assert main([first, first, "--output", str(output), "--metrics", "loss", "--width", "400"]) == 0
    with Image.open(output) as image:
        assert image.size == (400, 300)


def test_smoothing_is_a_mean_and_starts_unbiased():
    records = [{"step": s, "loss": v} for s, v in enumerate([8.0, float("nan"), 4.0, 4.0])]
    assert series(records, "loss", 0.0) == [(0, 8.0), (2, 4.0), (3, 4.0)]
    assert series([{"step": 1, "cer": 1.0}, {"step": 2, "cer": 0.1}], "cer", 0.9)[1] == (2, 0.1), "an evaluation"
    smooth = series(records, "loss", 0.5)
    assert smooth[0] == (0, 8.0) and smooth[1][1] == pytest.approx((0.5 * 8 * 0.5 + 0.5 * 4) / 0.75)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1, 7300), (-3e-5, 4e-5), (0.999, 1.001), (5e8, 6e8)])
def test_axes_show_all_points_between_a_few_ticks(low, high):
    figure = draw({"loss": {"a": [(1.0, low), (2.0, high)], "b": [(1.0, low)], "empty": []}}, 600)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    bottom, top = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if bottom <= tick <= top]
    assert bottom < low < high < top and 3 <= len(ticks) <= 12
    assert [line.get_label() for line in axes.get_lines()] == ["a", "b", "empty"]


def test_without_matplotlib_the_message_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = write_run(tmp_path / "a", [{"step": 1, "loss": 1}])
    assert main([run, "--output", str(tmp_path / "x.png")]) == 2
    assert "run: pip install matplotlib" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing: does not exist; give the output_dir of a run, or its metrics.jsonl"),
        (["PICTURE"], "is no text file; give the output_dir of a run"),
        (["RESULT"], "is a result of mindvlm-evaluate; draw it with mindvlm-evaluate --compare"),
        (["RUN", "--metrics", "accuracy"], "--metrics accuracy: no run has it; expected one of loss"),
        (["RUN", "--smoothing", "1"], "--smoothing is 1.0"),
        (["RUN", "--width", "10"], "--width is 10"),
        (["EMPTY"], "holds no record yet"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, arguments, message):
    names = {"RUN": write_run(tmp_path / "a", [{"step": 1, "loss": 1}]), "EMPTY": write_run(tmp_path / "b", [])}
    names |= {"PICTURE": str(tmp_path / "p.png"), "RESULT": str(tmp_path / "results.json")}
    (tmp_path / "p.png").write_bytes(b"\x89PNG")
    (tmp_path / "results.json").write_text('{"benchmark": "pope", "tasks": {}}')
    arguments = [names.get(one, one) for one in arguments]
    assert main([*arguments, "--output", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "x.png").exists()


def test_only_png_is_written(tmp_path, capsys):
    run = write_run(tmp_path / "a", [{"step": 1, "loss": 1}])
    assert main([run, "--output", str(tmp_path / "x.jpg")]) == 2
    assert ".png" in capsys.readouterr().err


def spread(value):
    return {"median": value, "min": 0.9 * value, "max": 1.1 * value}


def write_reports(folder):
    figures = {"decode_tokens_per_s": 20.0, "prefill_s": 1.0, "page_s": 50.0, "peak_gib": 4.0, "peak_over_weights": 1.5}
    summary = {
        name: {key: spread(value) for key, value in figures.items()} for name in ("mindvlm:int8", "torch:float32")
    }
    alone = {key: value for key, value in summary["mindvlm:int8"].items() if key != "page_s"}
    summary |= {"machine": {"read_gb_per_s": spread(40.0)}, "llamacpp:q8_0": alone}
    bits = {"mindvlm:int8": 8, "torch:float32": 32, "llamacpp:q8_0": 8}
    growth = [
        {"contender": name, "rows": rows, "length": length, "prefill_tokens_per_s": 100.0, "decode_tokens_per_s": 9.0}
        for name in bits
        for rows, length in ((1, 128), (1, 512), (2, 128))
    ]
    paths = [folder / "benchmark.json", folder / "growth.json"]
    for path, report in zip(paths, ({"summary": summary, "bits": bits}, {"growth": growth}), strict=True):
        path.write_text(json.dumps(report))
    return list(map(str, paths))


def test_reports_of_the_benchmark_are_drawn(tmp_path, capsys):
    output = tmp_path / "figure.png"
    assert main([*write_reports(tmp_path), "--output", str(output)]) == 0
    with Image.open(output) as image:
        assert image.size == (1500, 660), "two rows of three panels"
        assert all(has_color(image, color) for color in PEER_COLORS.values())


def test_other_json_is_one_line(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    assert main([str(tmp_path / "other.json"), "--output", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert "is no report of mindvlm-benchmark" in error and error.count("\n") == 1
