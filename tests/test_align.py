"""align.py: clips get the words of a script."""

from __future__ import annotations

import random

import pytest

from prepare.align import align, words_of

STORY = """The quick brown fox jumps over the lazy dog, and then it rests for a while. Nobody came to the house until the
evening. We sat by the window and watched the rain fall on the old stone bridge. There were seven boats on the river, two of
them painted red. My grandfather used to say that rivers remember everything. I never believed him, but I liked the sound of
it. The next morning we packed our bags and walked to the station."""


def split(text: str) -> list[str]:
    return [word for word, _ in words_of(text)]


def ranges(script: str, *clips: str) -> list[str | None]:
    words = split(script)
    return [found and " ".join(words[slice(*found)]) for found in align([split(clip) for clip in clips], words)]


SENTENCES = [" ".join(split(sentence)) for sentence in STORY.split(".")[:-1]]


def test_words_of():
    assert words_of("“Don’t!” — he said.") == [("dont", 0), ("he", 11), ("said", 14)]
    assert [word for word, _ in words_of("你好，世界 ok")] == ["你", "好", "世", "界", "ok"]


def test_what_was_read_as_written():
    assert ranges(STORY, *SENTENCES) == SENTENCES


@pytest.mark.parametrize("seed", range(2))
def test_a_long_script_with_misrecognised_missing_and_added_words(seed):
    """Of 200 sentences every fifth is not read, one word in twelve is recognised wrongly; no clip gets words of another."""
    rng = random.Random(seed)
    syllables = ["ba", "do", "ki", "lu", "me", "nor", "pa", "ri", "sto", "tan", "ve", "zu"]
    vocabulary = ["the", "and", "of", "to", *("".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(800))]
    script = [[rng.choice(vocabulary[: rng.choice((8, 800))]) for _ in range(rng.randint(8, 25))] for _ in range(200)]
    read = [sentence for i, sentence in enumerate(script) if i % 5]

    def misheard(sentence: list[str]) -> list[str]:
        inner = [
            word if rng.random() > 1 / 12 else rng.choice([word + "n", rng.choice(vocabulary), ""]) for word in sentence[1:-1]
        ]
        return [sentence[0], *filter(None, inner), sentence[-1]]

    words = [word for sentence in script for word in sentence]
    found = align([misheard(sentence) for sentence in read], words)
    right = [place is not None and words[slice(*place)] == sentence for place, sentence in zip(found, read)]
    wrong = [i for i, place in enumerate(found) if place is not None and not right[i]]
    assert sum(right) >= 0.98 * len(read) and len(wrong) <= 0.02 * len(read), (sum(right), len(wrong), len(read))


def test_paragraphs_that_nobody_read():
    unread = "The chapter that follows was never read by anybody at the station, and the rain did not fall. " * 20
    script = f"{unread}{'. '.join(SENTENCES[:3])}. {unread}{'. '.join(SENTENCES[3:])}. {unread}"
    assert ranges(script, *SENTENCES) == SENTENCES


def test_a_sentence_that_was_read_twice():
    """And begun a third time: what is no sentence of the script is left out, or gets the words that were read."""
    twice = [SENTENCES[0], SENTENCES[1], SENTENCES[1], SENTENCES[2]]
    assert ranges(STORY, *twice) == twice


def test_the_same_line_at_two_places_of_the_script():
    refrain = "And the river runs on to the sea"
    lines = [refrain, SENTENCES[0], refrain, SENTENCES[1], refrain]
    script = ". ".join(lines)
    found = align([split(line) for line in lines], split(script))
    assert found == sorted(found) and [b - a for a, b in found] == [len(split(line)) for line in lines]


def test_numbers_in_digits_on_either_side():
    script = "In 1984 there were 3 dogs in the old house. Two hundred and five people saw them on that day."
    clips = ["in nineteen eighty four there were three dogs in the old house", "205 people saw them on that day"]
    first, second = ranges(script, *clips)
    assert first == "in 1984 there were 3 dogs in the old house"
    assert second == "two hundred and five people saw them on that day"


def test_misrecognised_words_at_the_ends():
    clips = [
        "nobody came to the house until the heavening",
        "he sat by a window and watched the rain fall on the oldstone brij",
    ]
    assert ranges(STORY, *clips) == SENTENCES[1:3]


def test_misrecognised_words_at_the_ends_of_the_script():
    clips = [
        "a kwik brown fox jumps over the lazy dog and then it rests for a while",
        "we packed our bags and walked to the stayshun",
    ]
    assert ranges(STORY, *clips) == [SENTENCES[0], SENTENCES[-1].removeprefix("the next morning ")]


def test_what_is_not_in_the_script():
    other = "Could you please turn off the television before you go to bed tonight"
    assert ranges(STORY, SENTENCES[0], other, "", SENTENCES[1], "uh") == [SENTENCES[0], None, None, SENTENCES[1], None]
    assert ranges(f"{STORY} 1984.", other) == [None], "a number does not stand for anything"
    assert ranges("", other) == [None] and ranges(STORY) == []


def test_text_without_blanks():
    script = "今天天气很好，我们去公园散步。晚上回家吃饭。"
    assert ranges(script, "今天天器很好我们去公园散步", "晚上回家吃饭") == [
        "今 天 天 气 很 好 我 们 去 公 园 散 步",
        "晚 上 回 家 吃 饭",
    ]
