"""The ledger: entries checked, statuses by rule, evidence picked up by itself, page and CSV."""

from __future__ import annotations

import copy
import itertools
import json

import armada_pages
import numpy as np
import pandas as pd
import pytest
import yaml

from armada_lib import audit, chapter, findings, ledger, plans, report
from armada_lib.ledger import analyses, entries, judges, table
from armada_lib.profiles import ROOT

RAW = yaml.safe_load(ledger.source().read_text(encoding="utf-8"))


@pytest.fixture
def edited(tmp_path):
    """`ledger.read` of the project's entries with one of them changed."""

    def read(id_: str, **changed):
        raw = copy.deepcopy(RAW)
        (entry,) = (e for e in raw["entries"] if e["id"] == id_)
        entry |= changed
        for key in [k for k, v in entry.items() if v is None]:
            del entry[key]
        path = tmp_path / "ledger.yaml"
        path.write_text(yaml.safe_dump(raw), encoding="utf-8")
        return ledger.read(path)

    return read


def entry(**given) -> ledger.Entry:
    return ledger.Entry(**({"id": "x", "kind": "claim", "title": "X", "chapter": "02_nlu"} | given))


# ------------------------------------------------------------------------------- entries


def test_every_table_figure_and_proposition_has_an_entry():
    ids = {e.id for e in ledger.book().entries}
    wanted = {f"table-{i}" for i in range(1, 16)} | {f"figure-{i}" for i in range(1, 13)}
    assert wanted | {"proposition-1", "proposition-2"} <= ids


def test_every_claim_of_the_paper_is_behind_some_entry():
    """All but counts of tasks and students, parameter odds and ends, and remarks of the audit."""
    used = {c for e in ledger.book().entries for c in e.claims}
    left = {
        "C01",
        "C02",
        "C03",
        "C04",
        "C18",
        "C30",
        "C69",
        "C70",
        "C71",
        "C72",
        "C73",
        "C76",
        "C77",
    }
    assert set(audit.claims().index) - used <= left


@pytest.mark.parametrize(
    "id_, changed, message",
    [
        ("bert-6l", {"claims": ["C7"]}, "entry 'bert-6l': unknown claim 'C7'"),
        ("bert-6l", {"chapter": "02_nul"}, "unknown chapter '02_nul'; did you mean '02_nlu'"),
        ("table-6", {"measure": {"rule": "aligner", "evidence": "nlu_cpu"}}, "unknown rule 'aligner'"),
        ("table-6", {"measure": {"rule": "losses", "evidence": "nlu_cpi"}}, "did you mean 'nlu_cpu'"),
        ("table-6", {"measure": {"rule": "losses", "evidence": "nlu_cpu", "options": {"task": []}}},
         "rule losses: got an unexpected keyword argument 'task'"),
        ("table-6", {"why": None}, "say why it was not attempted"),
        ("table-6", {"criterion": "mine"}, "a rule has its own criterion"),
        ("table-6", {"own": True}, "only one of measure, own and stated"),
        ("figure-1", {"stated": "reproducd"}, "unknown status 'reproducd'; did you mean 'reproduced'"),
        ("figure-1", {"criterion": None}, "a stated status needs a criterion"),
        ("proposition-1", {"claims": None}, "no claim is named"),
        ("deberta", {"why": None}, "nothing decides it"),
        ("deberta", {"id": "opt"}, "entry 'opt': the id is used twice"),
        ("deberta", {"kind": "tabel"}, "kind"),
        ("deberta", {"reason": "x"}, "reason"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_named(edited, id_, changed, message):
    with pytest.raises(ValueError, match=message):
        edited(id_, **changed)


def test_what_is_awaited_may_be_absent_but_not_misspelt(edited):
    awaited = {"rule": "losses", "evidence": "study"}
    assert edited("deberta", measure=awaited)
    with pytest.raises(ValueError, match="unknown evidence in book/results 'studdy'"):
        edited("deberta", measure=awaited | {"evidence": "studdy"})


# ------------------------------------------------------------------------------- statuses


def measured(outcome: str) -> ledger.Measured:
    return ledger.Measured(outcome, "", "", "", "3")


@pytest.mark.parametrize(
    "given, found, expected",
    [
        # the paper's own numbers decide a headline claim that they contradict, whatever is measured
        ({"claims": ["C08"]}, "reproduced", "contradicts itself"),
        ({"claims": ["C07", "C08"]}, "reproduced", "contradicts itself"),
        ({"claims": ["P1"], "kind": "proposition"}, None, "not reproduced"),
        # ... but not a table, of which only some claims are wrong
        ({"claims": ["C08"], "kind": "table"}, "reproduced", "reproduced"),
        ({"claims": ["C07"]}, "undecided", "undecided"),
        ({"claims": ["C07"]}, None, "not attempted"),
        ({"claims": ["C07"], "own": True}, None, "direction agrees"),
        ({"claims": ["C16"], "own": True}, None, "reproduced"),
        ({"claims": ["C07", "C16"], "own": True}, None, "direction agrees"),
        ({"claims": ["C42"], "own": True}, None, "not attempted"),
        ({"stated": "reproduced", "criterion": "c", "why": "w"}, None, "reproduced"),
        ({"stated": "reproduced", "criterion": "c", "chapter": "12_none"}, None, "not attempted"),
    ],
)  # fmt: skip
def test_a_status_follows_from_the_rules(given, found, expected):
    status, _ = ledger.status(entry(**given), measured(found) if found else None)
    assert status == expected


def test_the_verdict_is_the_one_of_the_chapter():
    """The NLU chapter judges its committed runs on the tasks with three seeds, by `report.judge`."""
    df = plans.committed("nlu_cpu").frame
    three = df[df.groupby("task")["seed"].transform("nunique") >= 3]
    losses = [
        a for a in report.arms(three)["arm"].unique() if a.startswith("ARMADA") and "(" not in a
    ]
    outcome, text = report.judge(three, losses)
    found = judges.losses("nlu_cpu")
    assert (found.outcome, found.text) == (outcome, text)
    assert found.seeds == "3" and "emoji painter" in found.said
    row = ledger.frame().set_index("id").loc["table-2"]
    assert (row["status"], row["verdict"], row["profile"]) == (outcome, text, "cpu")


def test_a_loss_is_compared_with_the_arm_that_is_named():
    found = judges.over("instruction_cpu", "SeqKD")
    df = plans.committed("instruction_cpu").frame
    df = df[df["teacher"].isna() | (df["teacher"] == "sd14")]
    mean = report.average(report.by_arm(df), "ARMADA cosine", "SeqKD")["mean"]
    assert f"ARMADA cosine minus SeqKD {mean:+.1f}".replace("-", "−") in found.short
    assert found.outcome == "undecided"  # one or two seeds
    assert judges.over("instruction_cpu", "nobody") is None


def test_the_aligner_is_compared_with_the_undistilled_student():
    df = plans.committed("nlu_cpu").frame
    df = df[(df["task"] == "stsb") & (df["seed"] == 0)]
    plain = df[(df["method"] == "undistilled") & (df["head"] == "student")]["score"].iloc[0]
    aligner = df[(df["head"] == "aligner") & (df["method"] == "armada")]["score"].mean()
    assert plain > aligner
    assert judges.aligner_below("nlu_cpu").outcome == "reproduced"


def test_heads_are_judged_by_the_interval():
    found = judges.heads("nlu_cpu", "student", "C38")
    assert found.outcome == "reproduced" and "[0.93, 0.99]" in found.short
    changed = audit.claims().copy()
    changed.loc["C38", "published"] = "0.10"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(audit.procedures, "claims", lambda: changed)
        assert judges.heads("nlu_cpu", "student", "C38").outcome == "direction agrees"


def test_evidence_is_picked_up_when_it_appears(tmp_path, monkeypatch):
    """An entry that was not attempted is judged as soon as its runs are in book/results."""
    awaiting = entry(id="later", kind="table", why="not yet",
                     measure={"rule": "losses", "evidence": ["later", "earlier"]})  # fmt: skip
    monkeypatch.setattr(plans.evidence, "folder", lambda: tmp_path)
    monkeypatch.setattr(plans, "folder", lambda: tmp_path)
    assert table.measured(awaiting) is None
    assert ledger.status(awaiting, None) == ("not attempted", "not yet")
    runs = (ROOT / "book/results/nlu_cpu.jsonl").read_text(encoding="utf-8")
    (tmp_path / "earlier.jsonl").write_text(runs)
    assert table.measured(awaiting).outcome == "not reproduced"
    # of several, the first that is there counts
    (tmp_path / "later.jsonl").write_text((ROOT / "book/results/reasoning_cpu.jsonl").read_text())
    assert table.measured(awaiting).outcome == "undecided"


def test_runs_of_other_tasks_are_no_verdict():
    assert judges.losses("nlu_cpu", tasks=["mnli"]) is None
    with pytest.raises(ValueError, match="unknown task 'mnly'"):
        judges.losses("nlu_cpu", tasks=["mnly"])
    assert judges.equal("nlu_cpu", 7) is None and judges.ahead("nlu_cpu", 8) is None


# ------------------------------------------------------------------------------- table and page


def test_the_ledger_says_everything_of_every_entry():
    df = ledger.frame()
    assert list(df["id"]) and df["id"].is_unique and len(df) == len(ledger.book().entries)
    assert set(df["status"]) <= set(ledger.STATUSES) and set(chapter.OUTCOMES) < set(
        ledger.STATUSES
    )
    assert (df["criterion"] != "").all() and (df["published"] != "").all()
    assert (df.loc[df["status"] == "not attempted", "why"] != "").all()
    judged = df[df["outcome"] != ""]
    assert len(judged) and (judged[["evidence", "profile", "seeds", "cast"]] != "").all(axis=None)
    for path in set(judged["evidence"]):
        assert (ROOT / path).exists()
    for name in set(df["chapter"]) - {""}:
        assert entries.chapter_file(name)


def test_counts_and_figure_hold_every_entry():
    counts = ledger.counts()
    assert counts.to_numpy().sum() == len(ledger.frame())
    figure = ledger.summary()
    shown = sum(int(t.get_text()) for t in figure.axes[0].texts)
    assert shown == len(ledger.frame())
    labels = [t.get_text() for t in figure.legends[0].get_texts()]
    assert all(f"{ledger.STATUSES[s]} {s}" in labels for s in counts)


def test_the_page_links_what_is_there():
    page = ledger.page("table", list(ledger.STATUSES))
    assert len(page) == 15
    second = page[page["entry"].str.startswith("[Table 2:")].iloc[0]
    assert second["entry"].endswith("](02_nlu.ipynb)") and "(cpu, seeds: 3)" in second["measured"]
    trail = ledger.trail(list(ledger.STATUSES)).set_index("entry")
    assert "[nlu_cpu.jsonl](results/nlu_cpu.jsonl)" in set(trail["evidence"])
    only = ledger.page("claim", ["contradicts itself"])
    assert len(only) and set(only["status"].str[:1]) == {"≠"}


def test_the_csv_is_the_ledger_and_is_left_alone(tmp_path):
    path = ledger.write(tmp_path / "ledger.csv")
    again = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert again.equals(ledger.frame().astype(str))
    before = path.stat().st_mtime_ns
    assert ledger.write(path).stat().st_mtime_ns == before


def test_links_in_cells_are_links_in_jupyter_too(monkeypatch):
    shown = []
    monkeypatch.setattr(chapter, "display", lambda bundle, raw: shown.append(bundle))
    df = pd.DataFrame({"a": ["[x <1>](02_nlu.ipynb)", "[−1.0, 2.0]"]})
    chapter.table(df, "c", "t-links", "row")
    assert '<a href="02_nlu.ipynb">x &lt;1&gt;</a>' in shown[0]["text/html"]
    assert "[−1.0, 2.0]" in shown[0]["text/html"]


def test_a_change_of_the_entries_makes_the_pages_stale(tmp_path):
    (tmp_path / "book/results").mkdir(parents=True)
    (tmp_path / "book/ledger.yaml").write_text("a")
    (tmp_path / "book/results/r.jsonl").write_text(json.dumps({}))
    first = armada_pages.digest(tmp_path)
    (tmp_path / "book/ledger.yaml").write_text("b")
    second = armada_pages.digest(tmp_path)
    (tmp_path / "book/results/r.jsonl").write_text("[]")
    assert len({first, second, armada_pages.digest(tmp_path)}) == 3


# ------------------------------------------------------------------------------- ablations, analyses


class Half:
    """What `plans.ablated` gives: crossed weights in which beta gains, alpha costs, gamma is noise."""

    name, said = "invented", "profile cpu; invented"
    levels = {"alpha": [0.0, 0.5], "beta": [0.0, 1.0], "gamma": [0.0, 1.0], "manifold": ["euclid"]}  # noqa: RUF012

    def __init__(self, seeds: int = 3, shuffled: float = 1.0):
        rng, rows = np.random.default_rng(0), []
        for task, seed in itertools.product(("cola", "rte"), range(seeds)):
            common = {"task": task, "title": task, "suite": task, "seed": seed, "head": "student",
                      "reading": "paper", "usual_beta": True, "collapsed": False}  # fmt: skip
            plain = {"method": "undistilled", "teacher": None, "manifold": None, "factor": "base",
                     "level": "", "alpha": 0.0, "beta": 0.0, "gamma": 0.0, "score": 50.0}  # fmt: skip
            rows.append(common | plain)
            for a, b, g in itertools.product((0.0, 0.5), (0.0, 1.0), (0.0, 1.0)):
                if a or b or g:
                    score = 50 + 2 * b - 2 * a + 0.1 * rng.normal()
                    rows.append(common | {
                        "method": "armada", "teacher": "sd14", "manifold": "euclid", "factor": "grid",
                        "level": f"{a}{b}{g}", "alpha": a, "beta": b, "gamma": g, "score": score,
                    })  # fmt: skip
            for loss, gain in (("euclid", 3.0), ("cosine", 1.0), ("elementwise", 2.0)):
                base = loss == "euclid"
                rows.append(common | {
                    "method": "armada", "teacher": "sd14", "manifold": loss, "alpha": 0.1,
                    "factor": "base" if base else "manifold",
                    "level": "" if base else report.LOSS[loss], "beta": 0.1, "gamma": 1.0,
                    "score": 50 + gain + 0.1 * rng.normal(),
                })  # fmt: skip
            last = next(
                r for r in reversed(rows) if r["factor"] == "base" and r["method"] == "armada"
            )
            rows.append(last | {"method": "shuffled", "score": 50 + shuffled + 0.1 * rng.normal()})
        self.frame = pd.DataFrame(rows)


def test_weights_are_judged_in_the_direction_that_is_claimed(monkeypatch):
    monkeypatch.setattr(plans, "ablated", lambda name: (Half(), None))
    assert analyses.weights("x", up=["beta"]).outcome == "reproduced"
    assert analyses.weights("x", down=["alpha"]).outcome == "reproduced"
    assert analyses.weights("x", up=["beta"], down=["alpha"]).outcome == "reproduced"
    assert analyses.weights("x", up=["alpha"]).outcome == "not reproduced"
    assert analyses.weights("x", up=["beta"], generates=True) is None
    # a gain from beta that the shuffled teacher gives as well is none of the teacher
    monkeypatch.setattr(plans, "ablated", lambda name: (Half(shuffled=3.0), None))
    assert analyses.weights("x", up=["beta"]).outcome != "reproduced"
    assert analyses.weights("x", down=["alpha"]).outcome == "reproduced"
    monkeypatch.setattr(plans, "ablated", lambda name: (Half(seeds=2), None))
    assert analyses.weights("x", up=["beta"]).outcome == "undecided"


def test_losses_are_compared_with_each_other(monkeypatch):
    monkeypatch.setattr(plans, "ablated", lambda name: (Half(), Half()))
    assert analyses.best_loss("x", "euclid").outcome == "reproduced"
    assert analyses.best_loss("x", "elementwise").outcome == "not reproduced"
    assert analyses.alike("x").outcome == "not reproduced"  # a point apart
    monkeypatch.setattr(plans, "ablated", lambda name: (None, None))
    assert analyses.best_loss("x") is None and analyses.alike("x") is None


def frames(robust: float = 1.0, frozen: float = -1.0) -> dict[str, pd.DataFrame]:
    """Numbers of the analyses: scores, sensitivities and noise with known differences."""
    rng, keys = np.random.default_rng(0), list(itertools.product(("CoLA", "RTE"), range(3)))
    jitter = lambda: 0.05 * rng.normal()
    score = [(t, s, a, x + jitter()) for t, s in keys
             for a, x in (("undistilled", 60.0), (findings.FROZEN, 60.0 + frozen))]  # fmt: skip
    sense = [(t, s, "ARMADA", h, x + jitter()) for t, s in keys
             for h, x in (("student", 2.0), ("aligner", 2.0 - robust))]  # fmt: skip
    noise = [("dolly", "Dolly", s, m, "student", g, x + jitter()) for s in range(3)
             for m, g, x in (("undistilled", 0, 30.0), ("ARMADA", 0, 32.0), ("ARMADA", 5, 30.5))]  # fmt: skip
    return {
        "about": pd.DataFrame([{"main": "euclid"}]),
        "scores": pd.DataFrame(score, columns=["task", "seed", "arm", "score"]),
        "sensitivities": pd.DataFrame(
            sense, columns=["task", "seed", "arm", "head", "sensitivity"]
        ),
        "noise": pd.DataFrame(
            noise, columns=["suite", "task", "seed", "arm", "head", "sigma", "score"]
        ),
    }


def test_analyses_are_judged_by_their_numbers(monkeypatch):
    runs = plans.committed("nlu_cpu")
    monkeypatch.setattr(plans, "analysed", lambda name: (runs, frames()))
    assert analyses.frozen_below("x").outcome == "reproduced"
    assert analyses.robust("x").outcome == analyses.noise_hurts("x").outcome == "reproduced"
    monkeypatch.setattr(plans, "analysed", lambda name: (runs, frames(robust=-1.0, frozen=1.0)))
    assert analyses.frozen_below("x").outcome == analyses.robust("x").outcome == "not reproduced"
    monkeypatch.setattr(plans, "analysed", lambda name: None)
    assert analyses.frozen_below("x") is None and analyses.measure("x", "purity") is None


@pytest.mark.parametrize("gap, outcome", [(1.0, "reproduced"), (-1.0, "not reproduced")])
def test_a_measure_is_judged_as_its_chapter_judges_all_of_them(monkeypatch, gap, outcome):
    rng, rows = np.random.default_rng(0), []
    for name, m in findings.MEASURES.items():
        for arm in ("ARMADA Euclid", "undistilled", findings.FROZEN, *findings.CONTROLS):
            for task, seed in itertools.product(("CoLA", "COPA"), range(3)):
                ours = m.sign * gap if arm == "ARMADA Euclid" else 0.0
                rows.append((task, seed, arm, name, ours + 0.01 * rng.normal()))
    invented = pd.DataFrame(rows, columns=["task", "seed", "arm", "measure", "value"])
    monkeypatch.setattr(findings, "measures", lambda frames: invented)
    monkeypatch.setattr(plans, "analysed", lambda name: (plans.committed("nlu_cpu"), frames()))
    assert findings.judge(frames())[0] == outcome
    for name in findings.MEASURES:
        assert analyses.measure("x", name).outcome == outcome
    with pytest.raises(ValueError, match="unknown measure 'purty'"):
        analyses.measure("x", "purty")


def test_the_answer_of_the_study_is_the_page_s(monkeypatch):
    monkeypatch.setattr(plans, "studied", lambda ns: type("Page", (), {"primary": {}})())
    assert judges.transfer("study") is None
    lead = type("Contrast", (), {"mean": 1.0, "low": 0.5, "high": 1.5, "n": 10})()
    page = type("Page", (), {"primary": {"stsb": lead}})()
    monkeypatch.setattr(plans, "studied", lambda ns: page)
    monkeypatch.setattr(judges.study_answer, "verdict", lambda p: ("reproduced", "It matters."))
    monkeypatch.setattr(plans, "committed", lambda name: type("E", (), {"said": "who"})())
    found = judges.transfer("study")
    assert (found.outcome, found.seeds, found.text) == ("reproduced", "10", "It matters.")
    assert found.short == "STS-B +1.00 [+0.50, +1.50]"


def test_several_metrics_are_as_good_as_the_worst(monkeypatch):
    frames = {m: plans.committed("nlu_cpu").frame for m in ("micro F1", "macro F1")}
    monkeypatch.setattr(judges.micro_macro, "frames", lambda records: frames)
    outcomes = iter(["reproduced", "direction agrees"])
    monkeypatch.setattr(report, "judge", lambda df, names: (next(outcomes), "said"))
    found = judges.f1("nlu_cpu")
    assert found.outcome == "direction agrees" and found.text == "micro F1: said macro F1: said"
