"""The linear judge on texts of known quality, in many scripts: neutral words, and a few good or bad ones.

A tenth of the labels is wrong, as people's are. What the judge learned is measured on right ones.
"""

import random
from dataclasses import dataclass

import numpy as np
import pytest

from components.rlhf.config.judge import LinearJudge as LinearConfig
from components.rlhf.data.records import PreferencePair, RatedText
from components.rlhf.rewards import linear
from components.rlhf.rewards.agreement import binomial_interval
from components.rlhf.rewards.linear import LinearJudge, accuracy, fit_linear_judge, rank_correlation
from components.rlhf.text.errors import InputError

NUM_TRAIN, NUM_FRESH, WRONG = 150, 200, 0.1


@dataclass(frozen=True, kw_only=True)
class Script:
    """The words of one script, and what is between them."""

    filler: str
    good: str
    bad: str
    space: str = " "
    num_filler: int = 8
    num_words: tuple[int, ...] = (1, 2)  # good or bad ones

    def text(self, is_good: bool, rng: random.Random) -> str:
        words = rng.choices(self.filler.split("|"), k=self.num_filler)
        for word in rng.sample((self.good if is_good else self.bad).split("|"), k=rng.choice(self.num_words)):
            words.insert(rng.randrange(len(words) + 1), word)
        return self.space.join(words)


SCRIPTS = {
    "English": Script(
        filler="the|film|was|shown|in|a|cinema|last|week|and|we|saw|it|with|friends|on|some|evening",
        good="great|wonderful|brilliant|moving",
        bad="dull|awful|boring|clumsy",
    ),
    "Chinese": Script(
        filler="我们|昨天|电影|看了|朋友|一起|晚上|城市|的|这个|然后|回家|时候|说话|下午|那里",
        good="精彩|感人|很棒|优秀",
        bad="无聊|糟糕|难看|失望",
        space="",
    ),
    "Japanese": Script(
        filler="昨日|映画を|友達と|見ました|その|夜に|そして|駅で|話して|この|時間|街の|私は|それから|帰った|カメラ",
        good="素晴らしい|感動した|楽しい|最高",
        bad="退屈な|ひどい|つまらない|最悪",
        space="",
    ),
    "Arabic": Script(
        filler="ذهبنا|إلى|السينما|مع|الأصدقاء|في|المساء|ثم|الفيلم|كان|هذا|الذي|يوم|شاهدنا|بعد|البيت",
        good="رائع|جميل|ممتاز|مدهش",
        bad="ممل|سيئ|ضعيف|رديء",
    ),
    "Thai": Script(
        filler="เมื่อวาน|เรา|ดู|หนัง|กับ|เพื่อน|ที่|โรง|ตอนเย็น|แล้ว|กลับบ้าน|เรื่อง|นี้|คน|ใน|เมือง",
        good="สนุก|ยอดเยี่ยม|ประทับใจ|ดีมาก",
        bad="น่าเบื่อ|แย่|ห่วย|ผิดหวัง",
        space="",
    ),
    "Korean": Script(
        filler="어제|친구와|영화를|보았다|그|저녁에|그리고|극장에서|이|시간|도시의|나는|그래서|집에|갔다|이야기를",
        good="훌륭한|감동적인|재미있는|최고의",
        bad="지루한|끔찍한|형편없는|최악의",
    ),
    "Hindi": Script(
        filler="कल|हमने|फिल्म|देखी|दोस्तों|के|साथ|शाम|को|और|फिर|घर|यह|शहर|में|वह",
        good="शानदार|बढ़िया|अद्भुत|सुंदर",
        bad="बेकार|उबाऊ|घटिया|बुरी",
    ),
    "Python code": Script(
        filler="x = 1|y = f(x)|for i in range(n):|    total += i|if x > y:|    x, y = y, x|while n:|    n -= 1|a[i] = b[i]|d = {}",
        good='"""Sum of x."""|return total|with open(path) as f:|assert x >= 0',
        bad="eval(x)|except: pass|global y|exec(s)",
        space="\n",
    ),
    "emoji": Script(filler="🌍|🚗|🏠|📚|🎬|🌙|☕|👩‍💻|🇯🇵|📅|🎵|🛒", good="👍🏽|😀|❤️|🎉", bad="👎🏽|😡|💔|🤮", space=""),
    "one letter": Script(filler="", good="A", bad="B", num_filler=0, num_words=(1,)),
}  # fmt: skip


def generate_pairs(name: str, num: int, seed: int, *, wrong: float = 0.0) -> list[PreferencePair]:
    """Pairs of unique prompts; of each the chosen text is the bad one with the probability wrong."""
    rng = random.Random(f"{name} {seed}")
    pairs = []
    for i in range(num):
        texts = [SCRIPTS[name].text(is_good, rng) for is_good in (True, False)]
        if rng.random() < wrong:
            texts.reverse()
        pairs.append(PreferencePair(prompt=f"{seed}.{i}? ", chosen=texts[0], rejected=texts[1]))
    return pairs


def generate_ratings(name: str, num: int, seed: int, *, wrong: float = 0.0) -> list[RatedText]:
    """Texts that are rated 1 to 2 if they are good, -2 to -1 if bad; with the probability wrong the other way round."""
    rng = random.Random(f"{name} {seed}")
    rated = []
    for i in range(num):
        is_good = rng.random() < 0.5
        rating = rng.uniform(1, 2) * (1 if is_good != (rng.random() < wrong) else -1)
        rated.append(RatedText(prompt=f"{seed}.{i}? ", completion=SCRIPTS[name].text(is_good, rng), rating=rating))
    return rated


def lower_end(judge: LinearJudge, pairs: list[PreferencePair]) -> float:
    return binomial_interval(accuracy(judge, pairs) * len(pairs), len(pairs), confidence=0.95)[0]


@pytest.mark.parametrize("name", list(SCRIPTS))
@pytest.mark.parametrize("seed", [1, 2])
def test_judge_learns_from_noisy_pairs(name: str, seed: int) -> None:
    train = generate_pairs(name, NUM_TRAIN, seed, wrong=WRONG)
    judge, quality = fit_linear_judge(LinearConfig(), [], train, seed=seed)
    assert lower_end(judge, generate_pairs(name, NUM_FRESH, seed + 100)) > 0.85
    assert set(quality) == {"words", "characters", "both"}
    assert tuple(judge.vectorizers) == linear.CANDIDATES[max(quality, key=lambda features: quality[features])]
    assert all(0.7 < value <= 1 for value in quality.values())


@pytest.mark.parametrize("name", list(SCRIPTS))
@pytest.mark.parametrize("features", ["words", "characters", "both"])
def test_judge_learns_with_each_of_the_features(name: str, features: str) -> None:
    train = generate_pairs(name, NUM_TRAIN, 3, wrong=WRONG)
    judge, quality = fit_linear_judge(LinearConfig(features=features), [], train, seed=1)
    assert lower_end(judge, generate_pairs(name, NUM_FRESH, 103)) > 0.85
    assert quality == {}


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_judge_learns_from_noisy_ratings(name: str) -> None:
    rated = generate_ratings(name, 2 * NUM_TRAIN, 1, wrong=WRONG)
    judge, quality = fit_linear_judge(LinearConfig(), rated, [], seed=1)
    assert lower_end(judge, generate_pairs(name, NUM_FRESH, 101)) > 0.85
    assert rank_correlation(judge, generate_ratings(name, NUM_FRESH, 102)) > 0.6
    assert set(quality) == {"words", "characters", "both"}
    assert tuple(judge.vectorizers) == linear.CANDIDATES[max(quality, key=lambda features: quality[features])]
    assert all(0.3 < value <= 1 for value in quality.values())


@pytest.mark.parametrize("seed", [1, 2])
def test_judge_of_wrong_labels_only_is_wrong(seed: int) -> None:
    """So that the tests above do not pass whatever the labels are."""
    judge, quality = fit_linear_judge(LinearConfig(), [], generate_pairs("English", NUM_TRAIN, seed, wrong=1.0), seed=1)
    assert accuracy(judge, generate_pairs("English", NUM_FRESH, seed + 100)) < 0.1
    assert max(quality.values()) > 0.9


@pytest.mark.parametrize("features", ["auto", "words", "characters", "both"])
def test_judge_of_random_labels_is_at_chance(features: str) -> None:
    """Of 20 intervals of 95% one misses 0.5 on average; more than 3 do with a probability of 1.6%."""
    misses, accuracies = 0, []
    for seed in range(20):
        judge, _ = fit_linear_judge(
            LinearConfig(features=features), [], generate_pairs("English", 60, seed, wrong=0.5), seed=seed
        )
        accuracies.append(accuracy(judge, generate_pairs("English", NUM_FRESH, seed + 100, wrong=0.5)))
        low, high = binomial_interval(accuracies[-1] * NUM_FRESH, NUM_FRESH, confidence=0.95)
        misses += not low <= 0.5 <= high
    assert misses <= 3
    assert abs(np.mean(accuracies) - 0.5) < 0.03


def stem(rng: random.Random) -> str:
    return "".join(rng.choices("abdegiklmoprtu", k=7))


def generate_pairs_of_suffixes(num: int, seed: int) -> list[PreferencePair]:
    """No word occurs twice; people prefer the ones on -xin to those on -quo."""
    rng = random.Random(seed)
    return [
        PreferencePair(
            prompt=f"{stem(rng)} ",
            chosen=f"{stem(rng)} {stem(rng)}xin {stem(rng)}",
            rejected=f"{stem(rng)} {stem(rng)}quo {stem(rng)}",
        )
        for _ in range(num)
    ]


def test_characters_are_chosen_where_only_they_tell() -> None:
    train, fresh = generate_pairs_of_suffixes(NUM_TRAIN, 1), generate_pairs_of_suffixes(NUM_FRESH, 2)
    judge, quality = fit_linear_judge(LinearConfig(), [], train, seed=1)
    of_words, _ = fit_linear_judge(LinearConfig(features="words"), [], train, seed=1)
    assert max(quality, key=lambda features: quality[features]) in ("characters", "both")
    assert "characters" in judge.vectorizers
    assert quality["words"] < 0.7 < 0.9 < quality["characters"]
    assert lower_end(judge, fresh) > 0.9
    assert lower_end(of_words, fresh) < 0.5


def test_characters_are_chosen_where_only_they_tell_by_ratings() -> None:
    pairs = generate_pairs_of_suffixes(NUM_TRAIN, 1)
    rated = [
        RatedText(prompt=pair.prompt, completion=text, rating=rating)
        for pair in pairs
        for text, rating in ((pair.chosen, 1.0), (pair.rejected, 0.0))
    ]
    judge, quality = fit_linear_judge(LinearConfig(), rated, [], seed=1)
    assert "characters" in judge.vectorizers
    assert quality["words"] < 0.4 < 0.7 < quality["characters"]
    assert lower_end(judge, generate_pairs_of_suffixes(NUM_FRESH, 2)) > 0.9


def generate_pairs_of_order(num: int, seed: int) -> list[PreferencePair]:
    """Both texts have the same words; in the better one helping precedes falling."""
    rng = random.Random(seed)
    pairs = []
    for i in range(num):
        words = rng.choices(["interesting", "considering", "discovering", "remembering"], k=4)
        at = rng.randrange(5)
        texts = [" ".join([*words[:at], *two, *words[at:]]) for two in (("helping", "falling"), ("falling", "helping"))]
        pairs.append(PreferencePair(prompt=f"{i}: ", chosen=texts[0], rejected=texts[1]))
    return pairs


def test_words_are_chosen_where_only_they_tell() -> None:
    """Pairs of words tell, and three characters do not reach from one word into the next far enough."""
    config = LinearConfig(max_character_ngram=3)
    train, fresh = generate_pairs_of_order(NUM_TRAIN, 1), generate_pairs_of_order(NUM_FRESH, 2)
    judge, quality = fit_linear_judge(config, [], train, seed=1)
    assert "words" in judge.vectorizers
    assert quality["characters"] < 0.8 < 0.95 < quality["words"]
    assert lower_end(judge, fresh) > 0.9


@pytest.mark.parametrize("num", [1, 2, 9])
@pytest.mark.parametrize("kind", ["pairs", "ratings"])
def test_there_is_no_choice_of_features_with_fewer_than_10_records(kind: str, num: int) -> None:
    ratings = generate_ratings("English", num, 1) if kind == "ratings" else []
    pairs = generate_pairs("English", num, 1) if kind == "pairs" else []
    judge, quality = fit_linear_judge(LinearConfig(), ratings, pairs, seed=1)
    assert quality == {}
    assert list(judge.vectorizers) == ["words", "characters"]


@pytest.mark.parametrize("kind", ["pairs", "ratings"])
@pytest.mark.parametrize("prompt", ["", None], ids=["no prompts", "unique prompts"])
def test_features_are_chosen_with_10_records(kind: str, prompt: str | None) -> None:
    ratings = generate_ratings("English", 10, 1) if kind == "ratings" else []
    pairs = generate_pairs("English", 10, 1) if kind == "pairs" else []
    if prompt is not None:
        ratings = [RatedText(prompt=prompt, completion=text.completion, rating=text.rating) for text in ratings]
        pairs = [PreferencePair(prompt=prompt, chosen=pair.chosen, rejected=pair.rejected) for pair in pairs]
    _, quality = fit_linear_judge(LinearConfig(), ratings, pairs, seed=1)
    assert set(quality) == {"words", "characters", "both"}


def test_features_are_chosen_on_prompts_that_were_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt has 6 pairs: a fifth of the prompts is held out, with all of their pairs."""
    pairs = [pair for i in range(20) for pair in same_prompt(f"prompt {i} ", generate_pairs("English", 6, i))]
    fits: list[list[PreferencePair]] = []
    tests: list[list[PreferencePair]] = []
    fit, quality_on = linear.fit_to_pairs, linear.accuracy
    monkeypatch.setattr(linear, "fit_to_pairs", lambda data, config: (fits.append(list(data)), fit(data, config))[1])
    monkeypatch.setattr(linear, "accuracy", lambda judge, data: (tests.append(list(data)), quality_on(judge, data))[1])
    fit_linear_judge(LinearConfig(), [], pairs, seed=1)
    assert [len(data) for data in fits] == [96, 96, 96, 120] and [len(data) for data in tests] == [24] * 3
    assert not {pair.prompt for pair in fits[0]} & {pair.prompt for pair in tests[0]}


def same_prompt(prompt: str, pairs: list[PreferencePair]) -> list[PreferencePair]:
    return [PreferencePair(prompt=prompt, chosen=pair.chosen, rejected=pair.rejected) for pair in pairs]


@pytest.mark.parametrize("features", ["auto", "words", "characters", "both"])
@pytest.mark.parametrize("num", [1, 20])
@pytest.mark.parametrize("spaces", ["", " ", " \n\t\u3000"], ids=["nothing", "a space", "several spaces"])
@pytest.mark.parametrize("kind", ["pairs", "ratings"])
def test_texts_of_only_spaces_are_an_error(kind: str, spaces: str, num: int, features: str) -> None:
    ratings = [RatedText(prompt=spaces, completion=spaces, rating=float(i)) for i in range(num)]
    pairs = [PreferencePair(prompt=spaces, chosen=spaces, rejected=spaces * 2)] * num
    with pytest.raises(InputError, match="contain nothing but spaces"):
        fit_linear_judge(
            LinearConfig(features=features),
            ratings if kind == "ratings" else [],
            pairs if kind == "pairs" else [],
            seed=1,
        )


@pytest.mark.parametrize("kind", ["pairs", "ratings"])
@pytest.mark.parametrize("features", ["auto", "words"])
def test_a_random_subset_of_many_records_is_used(monkeypatch: pytest.MonkeyPatch, kind: str, features: str) -> None:
    """It depends on the seed and on nothing else, and so does the judge."""
    sizes: list[int] = []
    for name in ("fit_to_pairs", "fit_to_ratings"):
        fit = getattr(linear, name)
        monkeypatch.setattr(
            linear,
            name,
            lambda data, config, fit=fit: (sizes.append(len({r.prompt for r in data})), fit(data, config))[1],
        )
    monkeypatch.setattr(linear, "MAX_RECORDS", 100)
    monkeypatch.setattr(linear, "MAX_RECORDS_OF_CHOICE", 50)
    ratings = generate_ratings("English", 300, 1, wrong=WRONG) if kind == "ratings" else []
    pairs = generate_pairs("English", 300, 1, wrong=WRONG) if kind == "pairs" else []
    config = LinearConfig(features=features)
    first, again, other = (fit_linear_judge(config, ratings, pairs, seed=seed) for seed in (1, 1, 2))
    assert sizes == ([40, 40, 40, 100] if features == "auto" else [100]) * 3
    assert first[0].terms == again[0].terms and first[1] == again[1]
    assert np.array_equal(first[0].coefficients, again[0].coefficients)
    assert first[0].terms != other[0].terms
    for judge, _ in (first, other):
        assert lower_end(judge, generate_pairs("English", NUM_FRESH, 101)) > 0.8


def test_a_subset_is_used_only_of_more_records_than_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = generate_pairs("English", 40, 1, wrong=WRONG)
    config = LinearConfig(features="words")
    whole = linear.fit_to_pairs(pairs, config)
    monkeypatch.setattr(linear, "MAX_RECORDS", 40)
    assert np.array_equal(fit_linear_judge(config, [], pairs, seed=1)[0].coefficients, whole.coefficients)
    monkeypatch.setattr(linear, "MAX_RECORDS", 39)
    assert fit_linear_judge(config, [], pairs, seed=1)[0].terms != whole.terms


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_every_seed_is_accepted(seed: int) -> None:
    _, quality = fit_linear_judge(LinearConfig(), [], generate_pairs("English", 30, 1), seed=seed)
    assert len(quality) == 3
