"""Sentences in ten scripts, fixed and random."""

from hypothesis import strategies as st

SENTENCES = {
    "en": "The quick brown fox jumps over the lazy dog.",
    "ru": "Съешь же ещё этих мягких французских булок.",
    "el": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "ar": "نص حكيم له سر قاطع وذو شأن عظيم.",
    "he": "דג סקרן שט בים מאוכזב ולפתע מצא חברה.",
    "hi": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा।",
    "th": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "zh": "我能吞下玻璃而不伤身体。",
    "ko": "키스의 고유조건은 입술끼리 만나야 한다.",
    "ja": "いろはにほへと ちりぬるを カタカナ。",
}
_RANGES = ["az", "ая", "αω", "اي", "את", "अह", "กฮ", "一龥", "가힣", "ぁヶ"]


@st.composite
def sentences(draw) -> str:
    """A sentence in one of ten scripts, with what goes wrong mixed in: runs of spaces, digits, emoji, line breaks."""
    first, last = draw(st.sampled_from(_RANGES))
    letters = st.characters(min_codepoint=ord(first), max_codepoint=ord(last), categories=["L", "M"])
    odd = st.sampled_from(["  ", " ", "\n", "\t", ".", "。", "#", "{", "}", "7", "e\u0301", "😀", "👍🏽", "\u200d"])
    text = "".join(draw(st.lists(st.one_of(letters, letters, letters, odd), min_size=1, max_size=30))).strip()
    return text or "x"
