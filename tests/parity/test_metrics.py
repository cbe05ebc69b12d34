"""chrF and BLEU against sacrebleu, on texts that are random, hostile or both."""

import random

import pytest
from sacrebleu.metrics import BLEU, CHRF

import common

# What tokenizers and whitespace rules trip over: entities, line ends, hyphens, digits beside stops, blanks that only
# Unicode knows, combining marks, scripts without spaces, characters of two code points.
PIECES = ["the", "cat", "The", "saw", "3.14", "1,000", "10-12", "x-", "-\n", "\n", ".", ",", "'s", "\"", "&quot;", "&amp;",
          "&amp;lt;", "&lt;", "&gt;", "<skipped>", "(", "]", "_", "~", "$", "/", "…", "—", "“q”", "ñandú", "É", "é", "мир",
          "猫が", "ประภาคาร", "👍🏽", "\u00a0", "\u3000", "\u2028", "\x1c", "\x85", "\t", "\u200b", "a.b", "5.", ".5", ",,", "dikgomo"]


class MetricsDriver(common.Driver):
    @staticmethod
    def executable():
        return common.BUILD / "tests" / "parity" / "metrics_driver"


@pytest.fixture(scope="module")
def driver():
    if not MetricsDriver.executable().exists():
        pytest.fail(f"{MetricsDriver.executable()} is missing: build the target metrics_driver first")
    running = MetricsDriver()
    yield running
    running.close()


def text(generator, most=14):
    return "".join(generator.choice(PIECES) + generator.choice([" ", " ", "", "  "])
                   for _ in range(generator.randint(0, most)))


def noisy(generator, reference):
    """An answer that shares much with its reference."""
    words = reference.split(" ")
    return " ".join(generator.choice(PIECES) if generator.random() < 0.25 else word for word in words)


def assert_equal(driver, answers, references):
    """`references`: of each answer; sacrebleu wants streams, filled up with None."""
    longest = max(map(len, references))
    streams = [[row[i] if i < len(row) else None for row in references] for i in range(longest)]
    wanted = {("bleu", 0): BLEU(), ("chrf", 2): CHRF(), ("chrf", 1): CHRF(beta=1)}
    for (metric, beta), reference in wanted.items():
        ours = driver.call(metric=metric, beta=beta, answers=answers, references=references)["score"]
        assert ours == pytest.approx(reference.corpus_score(answers, streams).score, abs=1e-9), (metric, answers, references)
    return ours


@pytest.mark.parametrize("seed", range(40))
def test_random_corpora(driver, seed):
    generator = random.Random(seed)
    references = [[text(generator) for _ in range(generator.choice([1, 1, 2, 4]))] for _ in range(generator.randint(1, 12))]
    answers = [noisy(generator, generator.choice(row)) for row in references]
    assert_equal(driver, answers, references)


@pytest.mark.parametrize("answer, references", [
    ("", [""]), ("", ["a"]), ("a", [""]), ("a", ["a"]), ("a", ["b"]), (" ", ["\u3000"]), ("ab", ["abcdefghij"]),
    ("abcdefghij", ["ab"]), ("a b", ["a b"]), ("a b c", ["a b c"]), ("a b c d", ["a b c d"]), ("a b c d", ["d c b a"]),
    ("a b c e f", ["x b c y z"]), ("e\u0301", ["\u00e9"]), ("word-", ["word"]), ("word-\n", ["word-"]), ("&amp;quot;", ["&quot;"]),
    ("1.000,5-6", ["1.000 , 5 - 6"]), (".5 5. 5.5", [". 5 5 . 5.5"]), ("a,,b..c", ["a , , b . . c"]), ("猫", ["犬", "猫"]),
    # two references of equal distance in length: the shorter one counts
    ("a b c", ["a b", "a b c d"]),
    # too short for the higher orders of one reference, not of the other
    ("abc", ["ab", "abcx"]),
])
def test_edges(driver, answer, references):
    assert_equal(driver, [answer], [references])
    assert_equal(driver, [answer, "the cat saw a red dog"], [references, ["the cat saw one red dog"]])


NUMBERS = ["18", " 18", "\n18.", "18.0", "The answer is $1,000.", "1000", "-2.5", "2.5", "25", "..", "-", "--7", "$", "a.b", "",
           "  ", "\u3000 18", "18\n", "18 ", "x 3 y 4", "3,", "\u096718", "[invalid]", "INVALID", "1 000", "1.000,5-6", "-.5"]


@pytest.mark.parametrize("metric", ["flexible-extract", "remove_whitespace"])
def test_exact_match_behind_the_filters_of_mgsm(driver, metric):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter, WhitespaceFilter
    chosen = {"flexible-extract": RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
              "remove_whitespace": WhitespaceFilter()}[metric]
    generator = random.Random(1)
    answers = NUMBERS + [text(generator) for _ in range(200)]
    for reference in ["18", "1000", "-2.5", "25", "invalid", "3.14", "5"]:
        for answer in answers:
            filtered = chosen.apply([[answer]], [{}])[0][0]
            theirs = exact_match_hf_evaluate([filtered], [reference], ignore_case=True, ignore_punctuation=True)["exact_match"]
            ours = driver.call(metric=metric, answers=[answer], references=[[reference]])["score"]
            assert ours == theirs, (answer, reference)


@pytest.mark.parametrize("metric, beta", [("bleu", 0), ("chrf", 2)])
@pytest.mark.parametrize("count", [2, 9])
def test_standard_errors_by_the_bootstrap(driver, metric, beta, count):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.api import metrics
    generator = random.Random(count)
    references = [text(generator) for _ in range(count)]
    answers = [noisy(generator, reference) for reference in references]
    items = list(zip(references, answers))
    theirs = metrics.stderr_for_metric(getattr(metrics, metric), bootstrap_iters=100)(items)
    ours = driver.call(metric=metric, beta=beta, answers=answers, references=[[r] for r in references], resamples=100)["score"]
    assert ours == pytest.approx(theirs, rel=1e-9)
