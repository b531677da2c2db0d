"""Porter's stemmer (An algorithm for suffix stripping, 1980) in the dialect that the rouge-score package uses: NLTK's.

    stem("relational") == "relat"

Terms as in the paper: m is the measure of a stem, [C](VC)^m[V]; *v*: contains a vowel; *d: ends in a double consonant;
*o: ends consonant-vowel-consonant, the last not w, x or y. NLTK's departures from the paper are marked.
"""
import functools

IRREGULAR = {"sky": "sky", "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news",
             "innings": "inning", "inning": "inning", "outings": "outing", "outing": "outing", "cannings": "canning",
             "canning": "canning", "howe": "howe", "proceed": "proceed", "exceed": "exceed", "succeed": "succeed"}

STEP2 = [("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble"),
         ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"),
         ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"),
         ("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful")]
STEP3 = [("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", "")]
STEP4 = ["al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate",
         "iti", "ous", "ive", "ize"]


def _shape(word: str) -> str:
    """'c' or 'v' for every letter; y is a consonant at the start and after a vowel."""
    shape = ""
    for letter in word:
        vowel = letter in "aeiou" or letter == "y" and shape.endswith("c")
        shape += "v" if vowel else "c"
    return shape


def _measure(stem: str) -> int:
    return _shape(stem).count("vc")


def _ends_cvc(stem: str) -> bool:
    shape = _shape(stem)
    return shape.endswith("cvc") and stem[-1] not in "wxy" or shape == "vc"      # NLTK: or the whole stem is vc


def _replace(word: str, rules: list[tuple[str, str]], least: int) -> str:
    """The first suffix that fits decides: it is replaced if what stands before it has measure ≥ least."""
    for suffix, replacement in rules:
        if word.endswith(suffix):
            before = word[:len(word) - len(suffix)]
            return before + replacement if _measure(before) >= least else word
    return word


def _step1a(word: str) -> str:
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]      # NLTK: dies → die, but flies → fli
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _step1b(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]      # NLTK: died → die, but spied → spi
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        if word.endswith(suffix) and "v" in _shape(word[:-len(suffix)]):
            word = word[:-len(suffix)]
            break
    else:
        return word
    if word.endswith(("at", "bl", "iz")):
        return word + "e"
    if len(word) > 1 and word[-1] == word[-2] and _shape(word)[-1] == "c":
        return word if word[-1] in "lsz" else word[:-1]
    return word + "e" if _measure(word) == 1 and _ends_cvc(word) else word


def _step1c(word: str) -> str:
    # NLTK: y → i only after a consonant that is not the whole stem (happy → happi, enjoy → enjoy, by → by)
    return word[:-1] + "i" if word.endswith("y") and len(word) > 2 and _shape(word[:-1])[-1] == "c" else word


def _step2(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:      # NLTK: first, and then step 2 again
        return _step2(word[:-2])
    if word.endswith("logi") and _measure(word[:-3]) > 0:      # NLTK
        return word[:-1]
    return _replace(word, STEP2, 1)


def _step4(word: str) -> str:
    for suffix in STEP4:
        if word.endswith(suffix):
            before = word[:-len(suffix)]
            fits = _measure(before) > 1 and (suffix != "ion" or before[-1] in "st")
            return before if fits else word
    return word


def _step5(word: str) -> str:
    if word.endswith("e"):
        m = _measure(word[:-1])
        if m > 1 or m == 1 and not _ends_cvc(word[:-1]):
            word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word


@functools.lru_cache(1 << 16)
def stem(word: str) -> str:
    """The stem of a lower-case word of letters and digits."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) <= 2:
        return word
    return _step5(_step4(_replace(_step2(_step1c(_step1b(_step1a(word)))), STEP3, 1)))
