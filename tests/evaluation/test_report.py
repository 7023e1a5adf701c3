"""The page and the comparison, from evaluations made up here: what they say, and that they stand alone."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from made import MANY, PROMPTS, make_run
from matplotlib.figure import Figure
from PIL import Image

from conftest import driftrl, run_command
from driftrl.checks import InputError
from driftrl.config import load_config
from driftrl.evaluation import compare as comparing
from driftrl.evaluation import report as reports
from driftrl.evaluation.comparison import find, write_comparison, write_comparison_picture
from driftrl.evaluation.evaluate import load_evaluation
from driftrl.evaluation.page import percent
from driftrl.evaluation.picture import Chart, Side, Stroke, _chart, draw
from driftrl.evaluation.plots import Line, label, plot, ticks
from driftrl.evaluation.report import _verdict, write_picture, write_report
from driftrl.evaluation.results import load_result, write_result


def test_a_change_that_rounds_to_nothing_has_no_sign():
    assert [percent(share) for share in (0.004, -0.004, 0.061, -0.061)] == ["0%", "0%", "+6%", "\u22126%"]


def test_runs_are_found_in_the_folder_that_holds_them(tmp_path):
    for name, seed in (("grpo", 0), ("drift", 0), ("drift", 1)):
        run = make_run(tmp_path / f"all/runs/{name}-seed{seed}", name, seed)
        write_result(run, tmp_path / f"all/results/{name}-seed{seed}.json")
    (tmp_path / "all/runs/notes").mkdir()
    for folder in ("all", "all/runs", "all/results"):  # of the whole experiment too
        methods = comparing.load_methods([tmp_path / folder])
        assert [(m.name, len(m.runs)) for m in methods] == [("drift", 2), ("grpo", 1)]


def test_of_enough_prompts_the_verdict_says_what_happened(tmp_path):
    evaluation = load_evaluation(make_run(tmp_path / "run"))
    more = evaluation.settings.model_copy(update={"prompts": PROMPTS * 2})
    told = _verdict(evaluation.model_copy(update={"settings": more}), evaluation.tuned[-1])
    assert told.startswith("The reward rose, from 1.100 to 3.100.")


def test_the_page_of_a_run_stands_alone(tmp_path):
    page = write_report(make_run(tmp_path / "run")).read_text()
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", page)
    assert "url(" not in page and "@import" not in page and "http-equiv" in page
    assert page.count("<img ") == 6 and page.count('<img src="data:image/webp;base64,') == 6
    assert all(alt.strip() for alt in re.findall(r'<img [^>]*alt="([^"]*)"', page))
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    assert (
        "On 3 prompts, too few to tell much of any other: the reward went from" in page
        and 'aria-sort="ascending"' in page
    )
    assert "Groups whose rewards were all equal: 10, in 10 of 20 iterations" in page
    assert "shaping:" in page


def test_that_images_were_drawn_without_noise_is_said(tmp_path):
    told = "drawn without noise on the way"
    assert told not in write_report(make_run(tmp_path / "noisy")).read_text()
    assert told in write_report(make_run(tmp_path / "still", eta=0.0)).read_text()
    flow = {"flow_sampler": "cps", "noise_level": 0.0}
    assert told in write_report(make_run(tmp_path / "flow", **flow)).read_text()


def test_prompts_come_by_loss_of_diversity(tmp_path):
    page = write_report(make_run(tmp_path / "run", loss=0.1)).read_text()
    table = page[page.index('class="sortable"') :]
    heads = re.findall(r'<th scope="row">(.*?)</th>', table)[:3]
    assert heads == ["&lt;script&gt;alert(1)&lt;/script&gt;", "a cat", "a fox"]


@pytest.mark.parametrize(
    ("similarity", "hacked", "worse"), [(0.2, False, False), (0.0, True, False), (-0.2, True, True)]
)
def test_a_reward_that_rises_alone_is_pointed_out(tmp_path, similarity, hacked, worse):
    page = write_report(make_run(tmp_path / "run", similarity=similarity)).read_text()
    assert ("sign of reward hacking" in page) == hacked
    assert ("match their prompts less" in page) == worse


@pytest.mark.parametrize(
    ("prompts", "stuck", "told"), [(MANY, 1, True), (MANY, 0, False), (PROMPTS, 1, False)]
)
def test_prompts_that_were_narrowed_for_nothing_are_pointed_out(tmp_path, prompts, stuck, told):
    """One of six gains nothing, and keeps as little of its diversity as the others; of three prompts nothing is said."""
    run = make_run(tmp_path / "run", loss=0.26, prompts=prompts)
    data = json.loads((run / "evaluation.json").read_text())
    if stuck:
        base, last = data["points"][0]["figures"]["reward"], data["points"][-1]["figures"]["reward"]
        last["per_prompt"][0] = base["per_prompt"][0]
    (run / "evaluation.json").write_text(json.dumps(data))
    page = write_report(run).read_text()
    found = re.search(r"(\d+) of (\d+) prompts lost more than half of their diversity for less", page)
    assert (found is not None) == told
    assert found is None or found.groups() == ("1", "6")


def test_a_report_without_pictures_log_or_checkpoints(tmp_path):
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "images")
    for name in ("metrics.jsonl", "config.yaml"):
        (run / name).unlink()
    data = json.loads((run / "evaluation.json").read_text())
    data["points"] = data["points"][:1]
    (run / "evaluation.json").write_text(json.dumps(data))
    page = write_report(run).read_text()
    assert "Only the base model" in page and "<img " not in page
    assert write_picture(run).is_file()


def test_the_picture(tmp_path):
    with Image.open(write_picture(make_run(tmp_path / "run"))) as picture:
        assert picture.format == "PNG" and picture.width > picture.height


def test_comparison_finds_who_keeps_more(tmp_path):
    runs = [
        make_run(tmp_path / f"{n}{s}", n, s, 2 + 0.1 * s, loss, prompts=MANY)
        for n, loss in (("grpo", 0.2), ("drift", 0.05))
        for s in (0, 1)
    ]
    methods = comparing.load_methods(runs)
    assert [(m.name, len(m.runs)) for m in methods] == [("grpo", 2), ("drift", 2)]
    (gain,) = comparing.compare(methods, ["diversity"])
    assert (gain.method, gain.against) == ("drift", "grpo")
    assert gain.diversity_gain.low > 0 and gain.reward_gain.mean > 0
    # Straight paths from (1.1, 0.6): loss 0.2 costs a mean of 0.2 at the end, loss 0.05 costs 0.05; half of
    # the difference is the mean over the range.
    assert gain.diversity_gain.mean == pytest.approx(0.075, abs=0.005)
    assert gain.diversity_share.mean == pytest.approx(0.075 / 0.5, abs=0.01)  # grpo has 0.6 to 0.4 there
    # At equal diversity, from 0.6 to 0.55: drift has gained four times as much as grpo there.
    assert gain.reward_share.mean == pytest.approx(3.0, abs=0.1)
    volumes = comparing.hypervolumes(methods, "diversity")
    assert volumes["drift"].low > volumes["grpo"].high
    page = write_comparison(runs, tmp_path / "out.html").read_text()
    assert "At equal reward drift has more than grpo of: diversity" in page
    assert "+15%" in page and f"+{gain.reward_share.mean:.0%}" in page
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", page)


def test_a_front_of_few_points_is_said_to_lie_too_low(tmp_path):
    """The same front, measured at one checkpoint of three: it is straight where the whole one bulges."""

    def bulging(number, figures):
        figures["reward"]["mean"], figures["diversity"]["mean"] = 1.0 + number, 0.6 - 0.1 * number**2 / 2

    whole, seldom, slow = (
        rewritten(make_run(tmp_path / n, n, prompts=MANY), bulging) for n in ("whole", "seldom", "slow")
    )
    data = json.loads((seldom / "evaluation.json").read_text())
    (seldom / "evaluation.json").write_text(
        json.dumps(data | {"points": [data["points"][0], data["points"][2]]})
    )
    findings = find([seldom, whole, slow])
    pair = findings.pairs[0]
    assert pair.diversity_gain.mean > 0.02 and pair.straight == (0.5, 1.0)
    told = findings.verdict()[-1]
    assert "Measured too seldom: seldom (100%)." in told and "--checkpoint all" in told
    assert told in write_comparison([seldom, whole], tmp_path / "page.html").read_text()
    assert "too seldom" not in " ".join(find([whole, slow]).verdict())


def test_a_single_seed_is_said_to_be_one(tmp_path):
    runs = [
        make_run(tmp_path / n, n, 0, 2.0, loss, prompts=MANY) for n, loss in (("grpo", 0.2), ("drift", 0.05))
    ]
    page = write_comparison(runs, tmp_path / "out.html").read_text()
    assert "on a single seed" in page and "may be chance" in page
    assert comparing.compare(comparing.load_methods(runs), ["diversity"], "drift")[0].diversity_gain.mean < 0


def test_of_many_methods_a_board_says_who_has_more(tmp_path):
    """More, less, a difference that rounds to 0%, and none."""
    losses = {"grpo": 0.2, "drift": 0.05, "worse": 0.3, "close": 0.2005, "same": 0.2}
    runs = [
        make_run(tmp_path / f"{n}{s}", n, s, 2 + 0.1 * s, loss, prompts=MANY)
        for n, loss in losses.items()
        for s in (0, 1)
    ]
    page = write_comparison(runs, tmp_path / "out.html").read_text()
    assert "At equal reward more varied than grpo by most of 2 measures: drift (2)." in page
    assert "At equal reward less varied than grpo by most of 2 measures: worse (2)." in page
    assert "At equal reward no clear difference to grpo: close and same." in page
    board = page[page.index('class="sortable board"') :]
    board = board[: board.index("</table>")]
    rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", board)
    assert [re.search(r"</svg></span>(\w+)</th>", row)[1] for row in rows] == [
        "drift",
        "worse",
        "close",
        "same",
    ]
    tints = [[float(tint) for tint in re.findall(r"--tint:([\d.]+)", row)] for row in rows]
    assert min(tints[0]) > 0 and min(tints[1]) > 0 and tints[2] == tints[3] == [0.0, 0.0]
    assert ['class="more"' in rows[0], 'class="less"' in rows[1]] == [True, True]
    # Half of what drift loses less, over the mean of 0.5 that grpo has, as in the test above.
    share = float(re.search(r'data-value="([\d.]+)"', rows[0])[1])
    assert share == pytest.approx(0.15, abs=0.02)
    assert page.count("Where along the reward") == 1 and "at equal reward, over the reward" in page


@pytest.mark.parametrize(("fallen", "against"), [("drift", "grpo"), ("drift", "drift")])
def test_a_reward_that_only_fell_is_said_to_have(tmp_path, fallen, against):
    made = {"grpo": 2.0, "ddpo": 1.0, fallen: -1.0}
    runs = [make_run(tmp_path / name, name, 0, gain, prompts=MANY) for name, gain in made.items()]
    page = write_comparison(runs, tmp_path / "page.html", against).read_text()
    assert "drift never got above the base model&#39;s reward" in page
    assert "drift cannot be told apart" not in page and "drift and grpo" not in page
    assert ("ddpo has less than grpo" in page) == (against == "grpo")


def test_a_single_seed_is_said_of_the_method_that_has_one(tmp_path):
    made = (("grpo", 0.2, (0, 1)), ("drift", 0.05, (0, 1)), ("once", 0.1, (0,)))
    runs = [
        make_run(tmp_path / f"{n}{s}", n, s, 2 + 0.1 * s, loss, prompts=MANY)
        for n, loss, seeds in made
        for s in seeds
    ]
    page = write_comparison(runs, tmp_path / "out.html").read_text()
    assert "At equal reward drift has more than grpo of: diversity" in page
    assert "At equal reward, on a single seed, once has more than grpo of: diversity" in page


def test_a_difference_that_rounds_to_nothing_is_no_headline(tmp_path):
    runs = [
        make_run(tmp_path / n, n, 0, 2.0, loss, prompts=MANY)
        for n, loss in (("grpo", 0.2), ("close", 0.2005))
    ]
    assert (
        find(runs).verdict()[0].startswith("At equal reward, on a single seed, close and grpo cannot be told")
    )


def rewritten(run, change):
    """With the figures of each point changed: ``change`` is told its number and its figures."""
    data = json.loads((run / "evaluation.json").read_text())
    for number, point in enumerate(data["points"]):
        change(number, point["figures"])
    (run / "evaluation.json").write_text(json.dumps(data))
    return run


def test_a_measure_that_never_moves_is_called_flat_and_not_without_a_reward_in_common(tmp_path):
    def constant(_, figures):
        figures["vendi"]["mean"] = 3.0

    runs = [
        rewritten(make_run(tmp_path / n, n, 0, gain, prompts=MANY), constant)
        for n, gain in (("grpo", 2.0), ("drift", 1.0))
    ]
    page = write_comparison(runs, tmp_path / "page.html").read_text()
    assert page.count("flat: nothing to compare") == 2 and "no reward in common" not in page

    def only_better(number, figures):
        figures["vendi"]["mean"] = 3.0 + number

    rewritten(runs[0], only_better)  # the last checkpoint exceeds all others in both
    rewritten(runs[1], lambda number, figures: figures["vendi"].update(mean=3.0 - number))
    page = write_comparison(runs, tmp_path / "page.html").read_text()
    assert page.count("a front of one point: nothing to compare") == 3 and "in common" not in page

    for run, rewards, levels in (
        (runs[0], (1.1, 2.0, 3.0), (3.0, 3.5, 3.4)),
        (runs[1], (1.1, 1.2, 1.3), (3.0, 2.9, 2.8)),
    ):

        def beyond(number, figures, rewards=rewards, levels=levels):
            figures["reward"]["mean"], figures["vendi"]["mean"] = rewards[number], levels[number]

        rewritten(run, beyond)
    page = write_comparison(runs, tmp_path / "page.html").read_text()
    assert page.count("no reward in common") == 2 and "nothing to compare<" not in page


def test_of_few_prompts_nothing_is_concluded(tmp_path):
    """The page, the terminal and the report of a run: figures, and neither intervals nor a verdict."""
    made = [
        make_run(tmp_path / f"{n}{s}", n, s, gain + 0.1 * s, loss)
        for n, gain, loss in (("grpo", 2, 0.2), ("drift", 2, 0.05), ("fallen", -1, 0.1))
        for s in (0, 1)
    ]
    page = write_comparison(made, tmp_path / "out.html").read_text()
    few = "On 3 prompts, too few to tell much of any other: who has more variety is left open."
    assert few in page and "drift has more" not in page and "fallen never got above" in page
    assert " to \N{MINUS SIGN}" not in page and not re.search(r" to [+0-9.]+\)", page)  # no interval
    assert set(re.findall(r"--tint:([\d.]+)", page)) == {"0.0"} and 'class="band' not in page
    shown = driftrl("compare", *made, "--out", tmp_path / "out.html").stdout
    assert few in shown and "drift has more" not in shown
    found = json.loads(driftrl("compare", *made, "--out", tmp_path / "out.html", "--json").stdout)
    assert {
        gain["variety_at_equal_reward"]["interval"] for gain in found["gains"] if gain["method"] == "drift"
    } == {None}
    report = write_report(made[0]).read_text()
    assert "of so few prompts no interval is given" in report and 'class="whisker' not in report
    assert not re.search(r" to [+\N{MINUS SIGN}0-9.]+(\)|<)", report)
    enough = write_report(make_run(tmp_path / "enough", prompts=MANY)).read_text()
    assert "95% interval" in enough and 'class="whisker' in enough and " to +" in enough


def test_the_command_shows_what_it_found(tmp_path):
    runs = [
        make_run(tmp_path / n, n, 0, 2.0, loss, prompts=MANY) for n, loss in (("grpo", 0.2), ("drift", 0.05))
    ]
    status, told = run_command("compare", *runs, "--out", tmp_path / "page.html")
    assert status == 0
    rows = {
        line.split()[0]: line.split()[1:]
        for line in told.splitlines()
        if line[:4] in ("base", "grpo", "drif")
    }
    findings = find(runs)
    (mean, _), *_ = findings.summary()[2]["cells"]
    assert rows["drift"][:2] == ["1", f"{mean:.3f}"]
    heading = told.partition("base model")[0]
    assert "gain: of diversity over grpo" in heading and heading.split()[-1] == "gain"
    (share,) = (
        p.diversity_share.mean for p in findings.pairs if (p.method, p.metric) == ("drift", "diversity")
    )
    assert rows["drift"][-1] == f"{share:+.0%}" and "%" not in rows["grpo"][-1]
    assert findings.verdict()[0] in told.replace("\n", " ")
    status, told = run_command("compare", tmp_path / "nowhere", runs[0])
    assert (status, "there is no such run or file" in told) == (2, True)
    (tmp_path / "empty").mkdir()
    status, told = run_command("compare", tmp_path / "empty", runs[0], runs[0])
    assert (status, "expected a run folder, or one that was measured" in told.replace("\n", " ")) == (2, True)


def test_what_was_found_goes_to_stdout_and_where_it_lies_to_stderr(tmp_path):
    runs = [
        make_run(tmp_path / f"{n}{s}", n, s, 2 + 0.1 * s, loss, prompts=MANY)
        for n, loss in (("grpo", 0.2), ("drift", 0.05))
        for s in (0, 1)
    ]
    page, findings = tmp_path / "page.html", find(runs)
    shown = driftrl("compare", *runs, "--out", page)
    assert findings.verdict()[0] in shown.stdout and "page.html" not in shown.stdout
    assert shown.stderr.startswith(f"open {page}") and "grpo" not in shown.stderr
    written = driftrl("compare", *runs, "--out", page, "--json")
    found = json.loads(written.stdout)
    assert (found["against"], found["verdict"]) == ("grpo", findings.verdict())
    assert [(m["name"], m["seeds"]) for m in found["methods"]] == [("grpo", [0, 1]), ("drift", [0, 1])]
    for gain, pair in zip(found["gains"], findings.pairs, strict=True):
        assert gain["variety_at_equal_reward"]["mean"] == pair.diversity_gain.mean
    status, told = run_command("compare", *runs, "--blind", tmp_path / "kit", "--json")
    assert (status, "--json: has no meaning with --blind" in told) == (2, True)


def test_no_figure_is_cut_off_in_eighty_columns(tmp_path, monkeypatch):
    """Also where names are long: that of the rival is no column's title."""
    monkeypatch.setenv("COLUMNS", "80")
    names = ("grpo-with-each-group-s-own-standard-deviation", "shaped-0.5-kl-0.03", "drift")
    runs = [make_run(tmp_path / n, n, loss=0.2 / (i + 1), prompts=MANY) for i, n in enumerate(names)]
    shown = driftrl("compare", *runs, "--against", names[0], "--out", tmp_path / "page.html").stdout
    heading, titles, *rows = shown.splitlines()
    assert heading.endswith(f"gain: of diversity over {names[0]} at equal reward")
    assert titles.split() == ["method", "seeds", "reward", "diversity", "Vendi", "score", "gain"]
    drift = next(row for row in rows if row.startswith("drift"))
    assert len(drift) <= 80
    assert [*map(float, drift.split()[1:5])] == pytest.approx([1, 3.1, 0.533, 3.078], abs=1e-3)
    assert drift.split()[5].endswith("%")


def test_a_comparison_is_never_written_over_a_run_s_own_report(tmp_path):
    runs = [make_run(tmp_path / n, n, loss=loss) for n, loss in (("grpo", 0.2), ("drift", 0.05))]
    before = [write_report(runs[0]).read_text(), write_picture(runs[0]).read_bytes()]
    shown = driftrl("compare", ".", runs[1], cwd=runs[0])
    assert shown.returncode == 0 and "open comparison.html" in shown.stderr
    assert {"comparison.html", "comparison.png"} <= {path.name for path in runs[0].iterdir()}
    for out, where in (
        ("report.html", runs[0]),
        (runs[0] / "report.htm", tmp_path),
        ("grpo/report.html", tmp_path),
    ):
        told = driftrl("compare", *runs, "--out", out, cwd=where)
        assert told.returncode == 2 and f"no run's own report; got {out}" in told.stderr
        assert "comparison.html" in told.stderr
    assert [(runs[0] / "report.html").read_text(), (runs[0] / "report.png").read_bytes()] == before


def test_refuses_to_compare_what_was_not_measured_alike(tmp_path):
    a = make_run(tmp_path / "a", "grpo")
    with pytest.raises(InputError, match="at least two"):
        comparing.load_methods([a])
    with pytest.raises(
        InputError, match=r"differ in images \(4 and 8\), encoder \('tiny-animals' and 'other'\)"
    ):
        comparing.load_methods([a, make_run(tmp_path / "b", images=8, encoder="other")])
    with pytest.raises(InputError, match=r"differ in shaping\.ratio"):
        comparing.load_methods([a, make_run(tmp_path / "c", "grpo", 1, changes={"shaping": {"ratio": 0.0}})])
    with pytest.raises(InputError, match="with seed 0"):
        comparing.load_methods([a, make_run(tmp_path / "d", "grpo", 0)])
    b = make_run(tmp_path / "e", "drift")
    with pytest.raises(InputError, match="did you mean 'drift'"):
        write_comparison([a, b], tmp_path / "out.html", "drft")
    data = json.loads((b / "evaluation.json").read_text())
    for key in ("mean", "low", "high"):
        data["points"][0]["figures"]["reward"][key] += 5
    (b / "evaluation.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="base models differ"):
        comparing.load_methods([a, b])
    (b / "evaluation.json").unlink()
    with pytest.raises(InputError, match="driftrl evaluate"):
        load_evaluation(b)
    assert not (tmp_path / "out.html").exists()


def test_runs_that_were_not_measured_are_all_named(tmp_path):
    """Those never measured, and those of which only the base model was."""
    runs = [make_run(tmp_path / name, name) for name in ("one", "two", "three", "four")]
    (runs[1] / "evaluation.json").unlink()
    data = json.loads((runs[3] / "evaluation.json").read_text())
    (runs[3] / "evaluation.json").write_text(json.dumps(data | {"points": data["points"][:1]}))
    with pytest.raises(InputError) as raised:
        comparing.load_methods([tmp_path])
    told = str(raised.value)
    assert f"{runs[3]}, {runs[1]}: " in told and "driftrl evaluate RUN --checkpoint all" in told
    assert str(runs[0]) not in told
    with pytest.raises(InputError, match=rf"driftrl evaluate {runs[1]} --checkpoint all"):
        comparing.load_methods(runs[:3])


def test_two_runs_of_one_name_and_seed_are_told_what_to_do(tmp_path):
    runs = [make_run(tmp_path / name, "mine") for name in ("mine-seed0", "mine-seed0-2")]
    with pytest.raises(InputError, match=r"leave one out.*another name: name: in its config\.yaml"):
        comparing.load_methods(runs)


def test_a_short_training_has_whole_iterations_and_no_moving_average(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(reports, "draw", lambda path, prompts, sides, charts: drawn.update(charts=charts))
    run = make_run(tmp_path / "run")
    write_picture(run)
    assert [len(chart.strokes) for chart in drawn["charts"]] == [2, 2]  # of 20 iterations
    assert "a moving average" in write_report(run).read_text()
    log = (run / "metrics.jsonl").read_text().splitlines()[:2]
    (run / "metrics.jsonl").write_text("\n".join(log))
    write_picture(run)
    (chart, _) = drawn["charts"]
    (stroke,) = chart.strokes
    assert (list(stroke.points), chart.whole) == ([(1.0, 1.1), (2.0, 1.2)], True)
    assert "a moving average" not in write_report(run).read_text()


def test_ticks_of_what_is_counted_are_whole_numbers():
    for whole in (True, False):
        axes = Figure().add_subplot()
        _chart(axes, Chart("reward", "iteration", [Stroke([(1.0, 0.0), (2.0, 1.0)], "#000000")], whole))
        assert all(float(tick).is_integer() for tick in axes.get_xticks()) == whole


def test_ticks_are_round():
    assert ticks(0.13, 0.61) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert ticks(0, 3, integer=True) == [0, 1, 2, 3]
    assert label(-0.5, [-0.5, 0.0, 0.5]) == "\N{MINUS SIGN}0.5" and label(20, [0, 20]) == "20"


@pytest.mark.parametrize(
    "damage",
    ["no JSON", "[]", '{"format": 1}', "config", "training", "evaluation"],
)
def test_small_files_say_what_the_runs_say_and_damaged_ones_are_refused(tmp_path, damage):
    runs = [
        make_run(tmp_path / name, name, 0, gain, 0.1 + 1e-9) for name, gain in (("grpo", 1.0), ("drift", 2.0))
    ]
    files = [write_result(run, tmp_path / "results" / f"{run.name}.json") for run in runs]
    result = load_result(files[0])
    assert result.training.iterations == 20 and result.training.warnings == {
        "warning/constant_reward_groups": 10
    }
    assert result.training.curves["reward/mean"][-1] == 3.0
    assert result.config == load_config(runs[0] / "config.yaml")
    whole, small = comparing.load_methods(runs), comparing.load_methods([tmp_path / "results"])
    assert {m.name for m in small} == {"grpo", "drift"}
    a, b = (
        {
            p.metric: (p.diversity_gain.mean, p.diversity_gain.low)
            for p in comparing.compare(m, ["diversity", "vendi"], "grpo")
        }
        for m in (whole, small)
    )
    for metric, gain in a.items():
        assert b[metric] == pytest.approx(gain, abs=1e-5)
    if damage in ("config", "training", "evaluation"):
        data = json.loads(files[0].read_text())
        data[damage] = {"something": "else"}
        damage = json.dumps(data)
    files[0].write_text(damage)
    with pytest.raises(InputError, match=r"grpo\.json"):
        load_result(files[0])
    with pytest.raises(InputError, match=r"grpo\.json"):
        comparing.load_methods(files)


def test_the_picture_of_a_comparison_has_a_block_for_each_method(tmp_path):
    runs = [make_run(tmp_path / name, name, 0, gain) for name, gain in (("grpo", 1.0), ("drift", 2.0))]
    seeds = [runs[0], make_run(tmp_path / "again", "grpo", 1)]
    sizes = []
    for chosen in (seeds, runs):
        with Image.open(write_comparison_picture(chosen, tmp_path / "picture.png")) as picture:
            sizes.append(picture.size)
    assert sizes[1][0] > sizes[0][0] and sizes[1][1] == sizes[0][1]


def test_a_comparison_without_kept_pictures_has_no_picture(tmp_path):
    runs = [make_run(tmp_path / name, name, 0, gain) for name, gain in (("grpo", 1.0), ("drift", 2.0))]
    files = [write_result(run, tmp_path / "results" / f"{run.name}.json") for run in runs]
    assert write_comparison_picture(files, tmp_path / "picture.png") is None
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("dy", [0.06, -0.06])
def test_the_base_model_s_name_covers_no_point(dy):
    """A method's point just above the base model's, or just below: the name goes to the other side."""
    page = plot([Line([(0.5, 0.5 + dy), (1, 1), (0, 0)], 0, "none", ["near", "far", "far"]),
                 Line([(0.5, 0.5)], -1, "none", ["base model"], {0: "base"})], "reward", "")  # fmt: skip
    name, base = (
        re.search(r'class="name" x="[\d.]+" y="([\d.]+)"', page),
        re.search(r'class="mark cb"><circle cx="[\d.]+" cy="([\d.]+)"', page),
    )
    assert (float(name[1]) - float(base[1])) * dy > 0  # an SVG's y grows downwards


def test_the_pictures_labels_lie_within_it(tmp_path):
    """Long prompts, wide letters, formulas: nothing touches the left edge."""
    prompts = [
        "WWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWW",
        "a photo of a man in a red coat on a bicycle in the rain",
        "a\tcat for $5, or $6^",
    ]
    rows = [[Image.new("RGB", (16, 16), "red")]] * len(prompts)
    path = draw(tmp_path / "report.png", prompts, [Side("one $a$", "#0f766e", rows)], [])
    shown = np.asarray(Image.open(path).convert("L"))
    assert (shown[:, :3] == 255).all()
    assert (shown[:, :200] < 128).any()
