"""What raters said: un-blinded and counted right, and refused where it does not fit the page."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import make_run
from PIL import Image

from driftrl.checks import InputError
from driftrl.cli.main import main
from driftrl.evaluation.blind import Key, Shown, Trial
from driftrl.evaluation.choices import sign_test
from driftrl.evaluation.judge import judge
from driftrl.files import write_json

KIT = "0123456789abcdef"
OTHER = {"left": "right", "right": "left", "same": "same"}


def make_kit(folder, count=10, mirrored=False):
    """A key of ``count`` pairs, grpo on the left in every other one."""
    folder.mkdir(exist_ok=True)
    shown = [
        Shown(method=name, run=name, training_seed=0, checkpoint="000020") for name in ("grpo", "[red]drift$")
    ]
    trials = []
    for k in range(count):
        names = [shown[(k + mirrored) % 2].method, shown[(k + mirrored + 1) % 2].method]
        trials.append(
            Trial(trial=f"{k + 1:03d}", place=k, prompt=f"prompt {k}", left=names[0], right=names[1])
        )
    write_json(folder / "key.json", Key(kit=KIT, seed=0, shown=shown, trials=trials).model_dump(mode="json"))
    return folder


def side_of(method, k):
    """Where a method stands in pair k of `make_kit`; 'same' for none."""
    return {"grpo": ("left", "right")[k % 2], "drift": ("right", "left")[k % 2], "same": "same"}[method]


def save(path, sides, rater="", **changes):
    """A file of answers: for each pair (coherence, distinctiveness) as sides."""
    answers = [
        {"trial": f"{k + 1:03d}", "coherence": a, "distinctiveness": b} for k, (a, b) in enumerate(sides)
    ]
    path.write_text(json.dumps({"format": 1, "kit": KIT, "rater": rater, "answers": answers, **changes}))
    return path


def chosen(coherence, distinctiveness):
    """Sides from methods, pair by pair."""
    return [
        (side_of(a, k), side_of(b, k))
        for k, (a, b) in enumerate(zip(coherence, distinctiveness, strict=True))
    ]


def test_one_rater(tmp_path):
    kit = make_kit(tmp_path / "kit")
    coherence = ["grpo"] * 4 + ["drift"] * 4 + ["same"] * 2
    distinctiveness = ["drift"] * 9 + ["grpo"]
    analysis = judge(kit, [save(tmp_path / "a.json", chosen(coherence, distinctiveness), "Ann")])
    assert (analysis.raters, analysis.prompts) == (["Ann"], 10)
    even, varied = analysis.findings
    assert [s.chosen for s in even.standings] == [4, 4] and (even.same, even.undecided) == (2, 2)
    assert even.p_value == 1 and even.agreement is None
    grpo, drift = varied.standings
    assert (grpo.method, drift.method) == ("grpo", "[red]drift$")
    assert (drift.chosen, drift.prompts, drift.win_rate.mean) == (9, 9, pytest.approx(0.9))
    assert drift.win_rate.low > 0.5 and grpo.win_rate.high < 0.5
    assert varied.p_value == sign_test(9, 1) == pytest.approx(22 / 1024)
    # Clopper and Pearson for 9 of 10.
    assert (drift.prompt_rate.low, drift.prompt_rate.high) == pytest.approx((0.55498, 0.99747), abs=1e-5)
    assert json.loads((kit / "analysis.json").read_text()) == analysis.model_dump(mode="json")
    with Image.open(kit / "analysis.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height


def test_a_rater_who_always_says_left_favours_nobody(tmp_path):
    kit = make_kit(tmp_path / "kit")
    finding = judge(kit, [save(tmp_path / "a.json", [("left", "left")] * 10)]).findings[0]
    assert [s.chosen for s in finding.standings] == [5, 5] and finding.p_value == 1
    assert (finding.left, finding.right) == (10, 0)


def test_raters_are_no_independent_draws(tmp_path):
    kit, sides = make_kit(tmp_path / "kit", 4), chosen(["drift"] * 4, ["drift", "drift", "drift", "grpo"])
    files = [save(tmp_path / f"{k}.json", sides, f"rater {k}") for k in range(6)]
    alone, many = judge(kit, files[:1]).findings[0], judge(kit, files).findings[0]
    assert alone.p_value == many.p_value == sign_test(4, 0)
    assert many.standings[1].chosen == 24 and many.standings[1].prompts == 4


def test_agreement(tmp_path):
    kit = make_kit(tmp_path / "kit", 4)
    first = save(tmp_path / "1.json", chosen(["drift", "drift", "grpo", "grpo"], ["same"] * 4), "one")
    second = save(tmp_path / "2.json", chosen(["drift", "drift", "grpo", "drift"], ["same"] * 4), "two")
    two = judge(kit, [first, second])
    assert (two.findings[0].agreement.kind, two.findings[0].agreement.share) == ("Cohen", 0.75)
    assert two.findings[0].agreement.kappa == pytest.approx(0.5)
    assert two.findings[1].agreement.kappa is None and two.findings[1].standings[0].prompt_rate is None
    third = save(tmp_path / "3.json", chosen(["drift", "drift", "grpo", "grpo"], ["same"] * 4), "three")
    three = judge(kit, [first, second, third]).findings[0]
    assert three.agreement.kind == "Fleiss" and 0 < three.agreement.kappa < 1
    assert three.undecided == 0 and [s.prompts for s in three.standings] == [2, 2]


SIDES = st.sampled_from(["left", "right", "same"])


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.lists(st.tuples(SIDES, SIDES), min_size=5, max_size=5), min_size=1, max_size=3))
def test_mirrored_pages_with_mirrored_answers_say_the_same(tmp_path, raters):
    found = []
    for mirrored in (False, True):
        kit = make_kit(tmp_path / f"kit{mirrored}", 5, mirrored)
        turned = [[tuple(OTHER[s] for s in pair) if mirrored else pair for pair in sides] for sides in raters]
        files = [save(tmp_path / f"{mirrored}{k}.json", sides, str(k)) for k, sides in enumerate(turned)]
        findings = [f.model_dump() for f in judge(kit, files).findings]
        for finding in findings:
            if mirrored:
                finding["left"], finding["right"] = finding["right"], finding["left"]
        found.append(findings)
    assert found[0] == found[1]


GOOD = [{"trial": f"{k:03d}", "coherence": "left", "distinctiveness": "same"} for k in (1, 2, 3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kit": "another"}, "another page"),
        ({"format": 2}, "format 1; got 2"),
        ({"answers": GOOD[:2]}, "not answered: 003"),
        ({"answers": [*GOOD, {**GOOD[0], "trial": "009"}]}, "unknown: 009"),
        ({"answers": [*GOOD, GOOD[0]]}, "answered twice: 001"),
        ({"answers": [*GOOD[:2], {**GOOD[2], "coherence": "both"}]}, "answers.2.coherence"),
        ({"answers": [*GOOD[:2], {"trial": "003", "coherence": "left"}]}, "answers.2.distinctiveness"),
        ({"answers": "left"}, "answers: expected a valid list; got 'left'"),
        ({"rater": 3}, "rater"),
        ({"note": "hello"}, "note: no such key"),
    ],
)
def test_refuses_answers_that_do_not_fit(tmp_path, changes, message):
    kit, file = make_kit(tmp_path / "kit", 3), tmp_path / "a.json"
    good = {"format": 1, "kit": KIT, "rater": "Ann", "answers": GOOD}
    file.write_text(json.dumps(good | changes))
    with pytest.raises(InputError, match=message):
        judge(kit, [file])
    assert not (kit / "analysis.json").exists()
    file.write_text(json.dumps(good))
    judge(kit, [file])


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.binary()
    | st.recursive(st.none() | st.text(), st.lists, max_leaves=5).map(lambda x: json.dumps(x).encode())
)
def test_refuses_any_other_bytes(tmp_path, content):
    file = tmp_path / "answers.json"
    file.write_bytes(content)
    with pytest.raises(InputError):
        judge(make_kit(tmp_path / "kit", 3), [file])


def test_a_rater_counts_once(tmp_path):
    kit = make_kit(tmp_path / "kit", 3)
    sides = [("left", "same")] * 3
    first, second = (save(tmp_path / f"{k}.json", sides, "Ann") for k in range(2))
    with pytest.raises(InputError, match="same rater, 'Ann'"):
        judge(kit, [first, second])
    nameless = save(tmp_path / "2.json", sides)
    with pytest.raises(InputError, match="counts once"):
        judge(kit, [nameless, tmp_path / "." / "2.json"])
    assert len(judge(kit, [first, nameless]).raters) == 2


def test_refuses_a_key_that_is_missing_or_damaged(tmp_path):
    answers = save(tmp_path / "a.json", [("left", "same")] * 3)
    with pytest.raises(InputError, match="--blind"):
        judge(tmp_path / "nowhere", [answers])
    kit = make_kit(tmp_path / "kit", 3)
    with pytest.raises(InputError, match="at least one file"):
        judge(kit, [])
    whole = json.loads((kit / "key.json").read_text())
    for damage in (
        {"shown": whole["shown"][:1]},
        {"trials": []},
        {"trials": [whole["trials"][0]] * 3},
        {"trials": [*whole["trials"][:2], {**whole["trials"][2], "left": "ppo"}]},
        {"seed": "none"},
        {"format": None},
    ):
        (kit / "key.json").write_text(json.dumps(whole | damage))
        with pytest.raises(InputError, match=r"key\.json"):
            judge(kit, [answers])


def test_the_commands(tmp_path, capsys, monkeypatch):
    def driftrl(*arguments):
        monkeypatch.setattr(sys, "argv", ["driftrl", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        told = capsys.readouterr()
        shown.append(told.out)
        return end.value.code, told.err

    shown: list[str] = []

    runs = [make_run(tmp_path / name, name) for name in ("grpo", "drift")]
    kit = tmp_path / "human"
    status, told = driftrl("compare", *runs, "--blind", kit, "--seed", 4)
    assert status == 0 and "[more answers ...]" in told
    key = json.loads((kit / "key.json").read_text())
    answers = [{"trial": t["trial"], "coherence": "same", "distinctiveness": "left"} for t in key["trials"]]
    file = tmp_path / "answers.json"
    file.write_text(json.dumps({"format": 1, "kit": key["kit"], "rater": "", "answers": answers}))
    status, told = driftrl("judge", kit, file)
    assert status == 0 and told.startswith(f"wrote {kit / 'analysis.json'}")
    assert "win rate" in shown[-1] and "distinctiveness: about the same 0 of 3 times, left 3" in shown[-1]
    torn, empty = tmp_path / "torn.json", tmp_path / "empty"
    torn.write_text('{"kit": ')
    empty.write_text("")
    for arguments, message in (
        (("judge", kit, kit / "key.json"), "expected answers; rater: is missing"),
        (("judge", kit, tmp_path / "none.json"), "expected a JSON file; there is no such file"),
        (("judge", kit, torn), "expected a JSON file; got one that is not JSON at line 1, column 9"),
        (("compare", empty, runs[0]), "expected a JSON file; got one that is empty"),
        (("compare", *runs, "--blind", kit), "is taken"),
        (("compare", *runs, "--seed", 1), "--blind"),
        (("compare", *runs, "--blind", tmp_path / "b", "--against", "grpo"), "no meaning"),
    ):
        status, told = driftrl(*arguments)
        assert status == 2 and message in told
