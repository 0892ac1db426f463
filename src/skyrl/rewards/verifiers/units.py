"""Units of measure and nouns behind a number: what "5 cm" means, and whether it may be compared with "0.05 m".

The table says which words are the same unit (``centimetres``) or another size of it (``m``). Behind an answer only
units of the table, nouns of the list and nouns of the truth count (:func:`foreign`): other words may change the number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_PREFIXES = {
    "": ("", 0),
    "k": ("kilo", 3),
    "c": ("centi", -2),
    "m": ("milli", -3),
    "d": ("deci", -1),
    "M": ("mega", 6),
    "G": ("giga", 9),
    "T": ("tera", 12),
    "µ": ("micro", -6),
    "μ": ("micro", -6),
    "u": ("micro", -6),
    "n": ("nano", -9),
    "p": ("pico", -12),
}
_METRIC = {
    **{"m": "metre meter", "g": "gram gramme", "s": "second sec", "L": "litre liter", "l": "", "N": "newton"},
    **{"J": "joule", "W": "watt", "V": "volt", "A": "ampere amp", "Hz": "hertz", "Pa": "pascal", "Ω": "ohm"},
    **{"F": "farad", "K": "kelvin", "C": "coulomb", "mol": "mole", "eV": "electronvolt", "cal": "calorie"},
}
_ANY_PREFIX = set("mgsLlJ")
"""Take ``c``, ``d``, ``n`` and ``p``: ``dA`` is no tenth of an ampere, ``pV`` is pressure times volume."""
_DOLLARS = ("cad", "aud", "nzd", "hkd", "sgd")
_OTHER = {
    "m": "0.0254 in inch; 0.3048 ft foot feet; 0.9144 yd yard; 1609.344 mi mile",
    "g": "1000000 t tonne; 453.59237 lb lbs pound; 28.349523125 oz ounce",
    "s": "60 min minute; 3600 h hr hour; 86400 d day; 604800 week wk",
    "year": "1 year yr; 1/12 month",
    "°": "1 ° degree deg",
    "rad": "1 rad radian",
    "°C": "1 °C celsius centigrade",
    "°F": "1 °F fahrenheit",
    "B": "1 B byte; 1000 KB kB kilobyte; 1000000 MB megabyte; 1000000000 GB gigabyte; 1000000000000 TB terabyte",
    "$": "1 $ dollar usd US$ buck; 1/100 ¢ cent",
    **{f"{short}$": f"1 {short}$ {long}" for short, long in zip(("CA", "AU", "NZ", "HK", "SG"), _DOLLARS, strict=True)},
    "€": "1 € euro eur",
    "£": "1 £ gbp",
    "¥": "1 ¥ yen jpy",
    "₹": "1 ₹ rupee Rs inr",
    "元": "1 元 yuan rmb cny",
}
_IRREGULAR = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "mice": "mouse",
    "hertz": "hertz",
    "leaves": "leaf",
    "shelves": "shelf",
    "calves": "calf",
}
_NO_UNIT = {
    *("about", "above", "alpha", "and", "approximately", "are", "as", "at", "because", "below", "beta"),
    *("billion", "both", "but", "by", "cos", "cot", "csc", "cubed", "delta", "divided", "dozen", "e", "eighth"),
    *("eighths", "either", "equals", "except", "exp", "factorial", "fewer", "fifth", "fifths", "for", "fourth"),
    *("fourths", "from", "gamma", "half", "halves", "hundred", "hundredth", "hundredths", "i", "if", "inf"),
    *("infinite", "infinity", "is", "lambda", "less", "ln", "log", "max", "maybe", "million", "millionth"),
    *("millionths", "minus", "mod", "more", "mu", "multiplied", "nan", "negative", "no", "none", "nor"),
    *("not", "omega", "one", "only", "or", "out", "over", "percent", "percentage", "perhaps", "phi", "pi"),
    *("plus", "power", "quarter", "quarters", "rho", "root", "sigma", "sin", "sixth", "sixths", "so"),
    *("sqrt", "squared", "tan", "tau", "tenth", "tenths", "than", "theta", "third", "thirds", "thousand"),
    *("thousandth", "thousandths", "three", "times", "to", "trillion", "two", "under", "versus", "vs", "when"),
    *("where", "with", "wrong", "x", "y", "yes", "z", "zero"),
}
"""Words that say something about the number; text with one of them is no unit, not behind a truth either."""
_NOUNS = """
acre animal answer apple arrangement atm atom bag ball banana bar bead bean bee bell bill bird bit black block blue
boat book bottle box boy bracelet branch brick brother brown bucket building bus button cake calf camera can candle
candy car card carrot cat cell century chair chapter cherry chicken child chip chocolate choice circle city class
clip coin combination container cookie corner couch country cow crayon cube cup cupcake customer cycle decade
decibel desk diagonal dice different digit dish distinct divisor dog doll donut door dot drawer dress duck edge egg
element employee empty envelope error event face factor family fan farmer fish flight flower fly form free friend
frog fruit full function gal gallon game gift girl glass glove goal goat gold grape green grey group guest hat head
hectare hen hit hole horse house integer item jar job kid kitten knot lamp lap large leaf leg lemon lesson letter
level line list little lollipop lumen lux machine man mango marble match meal melon member mile mistake mouse move
movie muffin multiple nail necklace new night note notebook number object old onion orange order outcome owl pack
package packet page pancake pants part participant passenger path patient peach pear pen pencil penny person pet
petal photo picture pie piece pig pink pint pizza plane plant plate player plum point pole polygon possible pot
potato present prime prize problem puppy purple puzzle quart question rabbit rat real rectangle red ride ring robot
rock roll room rope rose round row rpm run sandwich seat seed selection shape sheep shelf shell ship shirt shoe shot
side silver sister skirt slice small snack sock solution song spider spoon square stair stamp star step stick
sticker stone store story strawberry string student subset sweet table tail task teacher team term test text ticket
tie tile toffee tomato total toy train tree triangle trip truck turn unique valid value van vase vehicle vertex
vertices vote walnut way wheel white whole window winner woman word worker yard yellow zebra
个 人 只 名 本 次 天 年 岁 种 块 颗 张 条 支 件 米 厘米 千米 公里
小时 分钟 秒 克 千克 公斤 平方厘米 平方米 立方厘米
"""
_COUNTED = frozenset(_NOUNS.split())
"""Nouns, and what describes them, that may stand behind an answer though the truth does not name them."""
_ALSO_SHORT_FOR = {"K", "B"}
"""``5K`` is five thousand, ``5B`` five billion, where the truth isn't in kelvin or bytes."""
_MAX_WORD = 3
"""Longer runs of letters are words, shorter ones may be products of variables."""
_LETTER_UNITS = set("mgshLlNJWVAKCF°%Ω")
"""Single letters that count as a unit in plain text; others are variables."""


def _table() -> dict[str, tuple[str, Fraction, int]]:
    """Name → (base, its size, power of the base)."""
    table: dict[str, tuple[str, Fraction, int]] = {}
    for symbol, names in _METRIC.items():
        base, power, size = ("m", 3, Fraction(1, 1000)) if symbol in "Ll" else (symbol, 1, Fraction(1))
        for short, (long, exponent) in _PREFIXES.items():
            if short and short in "cdnp" and symbol not in _ANY_PREFIX:
                continue
            entry = (base, size * Fraction(10) ** exponent, power)
            table.setdefault(short + symbol, entry)
            for name in names.split():
                table.setdefault(long + name, entry)
    for base, groups in _OTHER.items():
        for group in groups.split("; "):
            size_text, *aliases = group.split()
            table.update(dict.fromkeys(aliases, (base, Fraction(size_text), 1)))
    return table


_TABLE = _table()
_RATES = {"mph": "mile/hour", "kmh": "km/h", "kmph": "km/h", "kph": "km/h", "cc": "cm^3", "sqft": "ft^2"}
_RAISING, _RAISED = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}, {"squared": 2, "cubed": 3}
_FILLERS = {"unit", "units", "of", "the", "a", "an", "them", "each", "altogether", "total"}
_IN_TOTAL = re.compile(r"\bin (?:total|all)\b")
_IN_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\bdegrees? ?(c|f)(?:elsius|ahrenheit)?\b", re.IGNORECASE)
_TOKEN = re.compile(
    r"\s*(?:(?P<per>/|\bper\b)|(?P<times>[*·⋅])|\^\s*\{?\s*(?P<power>-?[1-9])\s*\}?"
    r"|(?P<name>(?:[A-Z]{2})?\$|[€£¥₹¢%]|°\s*[CFcf](?![A-Za-z])|°|[^\W\d_]+(?:[-'][^\W\d_]+)*\.?)(?P<digit>[23](?![0-9]))?)"
)


@dataclass(frozen=True)
class Unit:
    """A product of powers of units.

    Attributes:
        powers: Base unit or noun → exponent, without zeros.
        size: How many of the base units it is.
        nouns: Whether a base isn't in the table, such as "red apples".
        loose: Whether it is one letter right behind the number, as in ``5m``, which may be a variable; or ``mg``.
        doubtful: Names that aren't in the table nor in the list of nouns, or stand for a number, too.
    """

    powers: frozenset[tuple[str, int]]
    size: Fraction
    nouns: bool
    loose: bool = False
    doubtful: frozenset[str] = frozenset()


def _known(word: str) -> tuple[str, Fraction, int] | None:
    for name in (word, word.lower(), word.lower().removesuffix("s"), word.lower().removesuffix("es")):
        if name in _TABLE and (name == word or len(name) > 1):
            return _TABLE[name]
    return None


def _singular(word: str) -> str:
    word = _IRREGULAR.get(word.lower(), word.lower())
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if re.search(r"(?:x|s|ch|sh)es$", word):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _factors(text: str) -> list[tuple[str, int]] | None:
    """Names and exponents of a unit's text; ``None`` if it isn't written like one. Words beside each other multiply."""
    factors: list[tuple[str, int]] = []
    sign, raised, place, dangling, filled = 1, 1, 0, False, False
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            return None
        place, dangling = match.end(), bool(match["per"] or match["times"])
        word = (match["name"] or "").replace(" ", "").removesuffix(".")
        if dangling:
            sign = -1 if match["per"] else sign
        elif word.lower() in _RAISING:
            raised = _RAISING[word.lower()]
        elif match["power"] or word.lower() in _RAISED:
            if not factors and filled:
                continue  # units^2
            if not factors:
                return None
            name, power = factors[-1]
            factors[-1] = name, power * (int(match["power"]) if match["power"] else _RAISED[word.lower()])
        elif word.lower() in _FILLERS:
            filled = True
        else:
            factors.append((word, sign * raised * int(match["digit"] or 1)))
            raised = 1
    return None if dangling or (raised > 1 and not filled) else factors  # 5 square


def read_unit(text: str) -> Unit | None:
    """The unit that a text, which followed a number, names; ``None`` if it is none: it has operators, variables, digits
    or words that say more than a unit. What stands right behind the number, without a space, must be in the table.
    Words that name no size ("units", "of them") give a unit without powers."""
    plain = _IN_TOTAL.sub("", _DEGREES.sub(r"°\1", _IN_TEXT.sub(r" \1 ", text)))
    factors = _factors(_RATES.get(plain.strip().lower(), plain).strip()) if len(plain) <= 100 else None
    if factors is None:
        return None
    in_text, attached = plain != text, text[:1].isascii() and text[:1].isalpha()
    powers: dict[str, int] = {}
    size, nouns, doubtful = Fraction(1), False, set()
    for word, exponent in factors:
        letter = len(word) == 1 and word.isascii() and word.isalpha() and not in_text
        if word.lower() in _NO_UNIT or (letter and word not in _LETTER_UNITS):
            return None
        entry, noun = _known(word), _singular(word)
        listed = {noun, *(word.lower().removesuffix(end) for end in ("", "s", "es"))} & _COUNTED
        if entry is None and (attached or (len(word) <= _MAX_WORD and not in_text and not listed)):
            return None
        base, base_size, base_power = entry or (noun, Fraction(1), 1)
        if abs(exponent) > 1 and not in_text and entry and (base_power > 1 or base not in "ms"):
            return None  # mL^2 and kg^2 are products of variables
        nouns |= entry is None
        if word in _ALSO_SHORT_FOR or (entry is None and not listed):
            doubtful.add(base)
        powers[base] = powers.get(base, 0) + exponent * base_power
        size *= base_size**exponent
    loose = attached and (len(text) == 1 or text == "mg")
    return Unit(frozenset(item for item in powers.items() if item[1]), size, nouns, loose, frozenset(doubtful))


def foreign(answer: Unit | None, truth: Unit | None) -> bool:
    """Whether an answer's unit has a name that may say something about the number, and that the truth doesn't have."""
    return answer is not None and not answer.doubtful <= {name for name, _ in (truth.powers if truth else ())}


def same_kind(one: Unit, other: Unit) -> bool:
    """Whether quantities in these units can be compared. Nouns may be named in part: "5 red apples" and "5 apples"."""
    if one.powers == other.powers:
        return True
    return one.nouns and other.nouns and (one.powers < other.powers or other.powers < one.powers)
