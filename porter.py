"""Porter's stemmer (An algorithm for suffix stripping, 1980) in the dialect of the rouge-score
package, which is NLTK's; its departures from the paper are marked.

As in the paper: m is the measure of a stem, [C](VC)^m[V]; *v*: contains a vowel; *o: ends cvc."""

import functools


def rules(text: str) -> list[tuple[str, str]]:
    """ "enci→ence ful→" → [("enci", "ence"), ("ful", "")]"""
    return [tuple(rule.split("→")) for rule in text.split()]


IRREGULAR = dict(
    rules(
        "sky→sky skies→sky dying→die lying→lie tying→tie news→news innings→inning inning→inning "
        "outings→outing outing→outing cannings→canning canning→canning howe→howe "
        "proceed→proceed exceed→exceed succeed→succeed"
    )
)
STEP2 = rules(
    "ational→ate tional→tion enci→ence anci→ance izer→ize bli→ble alli→al entli→ent eli→e "
    "ousli→ous ization→ize ation→ate ator→ate alism→al iveness→ive fulness→ful ousness→ous "
    "aliti→al iviti→ive biliti→ble fulli→ful"
)
STEP3 = rules("icate→ic ative→ alize→al iciti→ic ical→ic ful→ ness→")
STEP4 = "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize".split()


@functools.lru_cache(1 << 16)
def stem(word: str) -> str:
    """The stem of a lower-case word of letters and digits."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) <= 2:
        return word
    word = step1c(step1b(step1a(word)))
    word = replace_suffix(step2(word), STEP3)
    return step5(step4(word))


def shape(word: str) -> str:
    """'c' or 'v' for every letter; y is a consonant at the start and after a vowel."""
    result = ""
    for letter in word:
        vowel = letter in "aeiou" or letter == "y" and result.endswith("c")
        result += "v" if vowel else "c"
    return result


def measure(stem: str) -> int:
    return shape(stem).count("vc")


def ends_cvc(stem: str) -> bool:
    letters = shape(stem)
    if letters == "vc":  # NLTK: or the whole stem is vc
        return True
    return letters.endswith("cvc") and stem[-1] not in "wxy"


def replace_suffix(word: str, rules: list[tuple[str, str]]) -> str:
    """The first suffix that fits decides: it is replaced if what stands before has m > 0."""
    for suffix, replacement in rules:
        if word.endswith(suffix):
            before = word.removesuffix(suffix)
            return before + replacement if measure(before) > 0 else word
    return word


def step1a(word: str) -> str:
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]  # NLTK: dies → die, flies → fli
    if word.endswith("sses"):
        return word[:-2]
    if word.endswith("s") and not word.endswith("ss"):
        return word[:-1]
    return word


def step1b(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]  # NLTK: died → die, spied → spi
    if word.endswith("eed"):
        return word[:-1] if measure(word[:-3]) > 0 else word
    before = None
    for suffix in ("ed", "ing"):
        if word.endswith(suffix) and "v" in shape(word.removesuffix(suffix)):
            before = word.removesuffix(suffix)
            break
    if before is None:
        return word
    if before.endswith(("at", "bl", "iz")):
        return before + "e"
    if len(before) > 1 and before[-1] == before[-2] and shape(before)[-1] == "c":
        return before if before[-1] in "lsz" else before[:-1]
    return before + "e" if measure(before) == 1 and ends_cvc(before) else before


def step1c(word: str) -> str:
    # NLTK: y → i only after a consonant that is not the whole stem: happi, but enjoy and by
    if word.endswith("y") and len(word) > 2 and shape(word[:-1])[-1] == "c":
        return word[:-1] + "i"
    return word


def step2(word: str) -> str:
    if word.endswith("alli") and measure(word[:-4]) > 0:  # NLTK: first, and then step 2 again
        return step2(word[:-2])
    if word.endswith("logi") and measure(word[:-3]) > 0:  # NLTK
        return word[:-1]
    return replace_suffix(word, STEP2)


def step4(word: str) -> str:
    for suffix in STEP4:
        if word.endswith(suffix):
            before = word.removesuffix(suffix)
            fits = measure(before) > 1 and (suffix != "ion" or before[-1] in "st")
            return before if fits else word
    return word


def step5(word: str) -> str:
    if word.endswith("e"):
        before = word[:-1]
        if measure(before) > 1 or measure(before) == 1 and not ends_cvc(before):
            word = before
    if word.endswith("ll") and measure(word[:-1]) > 1:
        return word[:-1]
    return word
