"""The committed page is that of the records, and every quoted number is recorded."""

from dataclasses import replace

import pytest

from results.page import (
    PAGE,
    ROOT,
    digest,
    figure_path,
    has_figure,
    heading_of,
    read_by_hand,
    read_records,
    render,
    section,
    table,
)
from results.quotes import Quote, find_quotes, mistakes, of_config, of_page
from results.record import Evaluation, Record, Run
from vlp.tasks.metrics import Interval


def run(seed: int = 0, **values: float) -> Run:
    metrics = {name: Interval(v, v - 0.01, v + 0.02, percent=name != "spearman") for name, v in values.items()}
    evaluation = Evaluation("sts", "data/sts", "all pairs", {"pairs": 1379}, 4, 0, 300, metrics)
    return Run(seed, 300, 1.5 + seed, 1, 2, "x86_64", "0.1.0", ("abc",), {"sts": evaluation}, {})


def record(**variants: tuple[Run, ...]) -> Record:
    metrics = tuple(f"sts/{name}" for name in next(iter(variants.values()))[0].evaluations["sts"].metrics)
    return Record("Title", ("vlp train configs/simcse/unsupervised.py",), variants, metrics, "A note.")


def test_page_is_that_of_the_records():
    records = read_records()
    assert (ROOT / PAGE).read_text() == render(records, read_by_hand()), (
        "docs/results.md differs from the records; run make results"
    )
    for name in filter(lambda name: has_figure(records[name]), records):
        assert digest(records[name]).encode() in figure_path(name).read_bytes(), name


def test_quoted_numbers_are_recorded():
    records = read_records()
    assert not [line for quote in find_quotes() for line in mistakes(quote, records)]


def test_table_of_one_run_has_intervals_of_the_bootstrap():
    assert table(record(a=(run(accuracy=0.5, spearman=0.25),))) == (
        "| metric | value | 95 % interval |\n"
        "| --- | --- | --- |\n"
        "| sts: accuracy | 50.0 % | 49.0 % to 52.0 % |\n"
        "| sts: spearman | 0.250 | 0.240 to 0.270 |"
    )


def test_table_of_seeds_has_their_mean_and_students_interval():
    runs = tuple(run(seed, accuracy=value) for seed, value in enumerate((0.31, 0.35, 0.30)))
    # mean 0.32, standard deviation 0.0265, quantile 4.303 of two degrees of freedom
    assert table(record(a=runs)).splitlines()[-1] == "| sts: accuracy | 32.0 % ± 6.6 | 31.0 % | 35.0 % | 30.0 % |"


def test_table_of_variants_has_a_row_each_and_a_dash_where_nothing_was_measured():
    one, other = (run(0, accuracy=0.2), run(1, accuracy=0.3)), (replace(run(), evaluations={}),)
    rows = table(record(one=one, other=other, single=(run(accuracy=0.4),))).splitlines()
    assert rows[0] == "| variant | seeds | minutes | sts: accuracy |"
    assert rows[2] == "| one | 2 | 1.5 to 2.5 | 25.0 % ± 63.5 |"  # 12.706 * 0.0707 / sqrt(2)
    assert rows[3] == "| other | 1 | 1.5 | - |"
    assert rows[4] == "| single | 1 | 1.5 | 40.0 % (39.0 % to 42.0 %) |"


def test_section_has_everything_that_is_needed_to_repeat_and_judge_the_result():
    text = section("simcse", record(a=(run(3, accuracy=0.5),)))
    for part in (
        '<a id="simcse"></a>',
        "A note.",
        "300 steps in 4.5 minutes, 1 process of 2 threads, x86_64. Seed 3.",
        "vlp 0.1.0, commit abc.",
        "sts: data/sts, 1,379 pairs; all pairs. A random answer is correct in 25.00 %.",
        "```bash\nvlp train configs/simcse/unsupervised.py\n```",
    ):
        assert part in text
    assert "Weights of step" not in text


def test_weights_of_an_earlier_step_are_named():
    made = run(accuracy=0.5)
    best = replace(made, evaluations={"sts": replace(made.evaluations["sts"], step=200)})
    assert "Weights of step 200." in section("a", record(a=(best,)))


def test_sections_do_not_depend_on_the_order_of_the_records():
    names = ["a", "b", "c"]
    records = {name: replace(record(a=(run(accuracy=0.5),)), title=name) for name in names}
    records["other"] = replace(records["a"], commands=("python mine.py",))
    assert heading_of(records["a"]) == "SimCSE" and heading_of(records["other"]) == "Other"
    page = render(records, "## By hand")
    positions = [page.index(part) for part in ("## SimCSE", 'id="a"', 'id="b"', 'id="c"', "## Other", 'id="other"')]
    assert positions == sorted(positions) and page.endswith("## By hand\n")


@pytest.fixture
def records() -> dict[str, Record]:
    return {"sts": record(a=(run(accuracy=0.324, spearman=-0.25),))}


@pytest.mark.parametrize("number", ["32.4", "-0.250", "-0.25", "1,379", "1379", "300", "31.4", "1.5", "2"])
def test_number_of_a_record_may_be_quoted(records, number):
    assert mistakes(Quote(ROOT / PAGE, "sts", (number,)), records) == []


@pytest.mark.parametrize("number", ["32.5", "32", "0.25", "1,378", "0.324"])
def test_number_that_a_record_lacks_is_a_mistake(records, number):
    assert mistakes(Quote(ROOT / PAGE, "sts", (number,)), records) == [f"docs/results.md quotes {number} from sts"]


def test_quote_of_a_missing_record_is_a_mistake(records):
    assert "which does not exist" in mistakes(Quote(ROOT / PAGE, "nothing", ()), records)[0]


def test_numbers_of_a_docstring_belong_to_the_reference_after_them(tmp_path):
    path = tmp_path / "config.py"
    path.write_text('''"""Title of 5 words.

Paper: 69.3 % (results: paper).
Measured: R@1 32.4 %, R@5 -0.5 of 1,819 on Flickr8k (vlp eval runs/a k=16; results of it) (results: a). 3 seeds
    2.5e-4 (results: b-2). 77 without a record.
"""

def one():
    """One.

    Measured: 7 (results: c).
    """
''')
    assert [(quote.name, quote.numbers) for quote in of_config(path)] == [
        ("paper", ("69.3",)),
        ("a", ("32.4", "-0.5", "1,819")),
        ("b-2", ("3", "2.5e-4")),
        ("c", ("7",)),
    ]


def test_numbers_of_a_page_are_those_of_the_link(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(
        "Of 8 words, see [12.5 %\nof 10](docs/results.md#a), and 3.\n\n"
        "| x | 1.5 | [`k=4` 2.5 ± 0.1](results.md#b) |\n| y | [record](../results.md#c) |\n"
        "All 7: [results](docs/results.md)\n"
    )
    assert [(quote.name, quote.numbers) for quote in of_page(path)] == [
        ("a", ("12.5", "10")),
        ("b", ("2.5", "0.1")),
        ("c", ()),
    ]
